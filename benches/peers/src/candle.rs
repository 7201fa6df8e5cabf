//! candle on the CPU, one query: the attention its Llama runs by default (repeat every KV head for its group,
//! widen half precision, multiply, softmax, multiply), and the flash attention of `candle_nn::attention`.
//!
//! *Helps* as what a Rust host has without kvsieve. *Hurts* nothing; growing the cache (`Tensor::cat`, a copy
//! of everything per token) is left out, in candle's favour.

use crate::config::{Config, KV_HEADS};
use crate::contestant::{Contestant, Kind, Result, Side};
use crate::data::Dense;
use candle_core::{DType, Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use half::f16;

/// Keys and values as `[1, KV heads, n, d]`.
#[derive(Debug)]
pub(crate) struct Store {
    dtype: DType,
    k: Tensor,
    v: Tensor,
}

impl Store {
    pub(crate) fn build(dense: &Dense, dtype: DType) -> Result<Self> {
        let tensor = |rows: &[f32]| {
            Tensor::from_slice(rows, (1, KV_HEADS, dense.n, dense.d), &Device::Cpu)?.to_dtype(dtype)
        };
        Ok(Self { dtype, k: tensor(&dense.k)?, v: tensor(&dense.v)? })
    }
}

/// Which code of candle's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// `repeat_kv`, matmul, softmax, matmul.
    Stock,
    /// `candle_nn::attention::flash_attn`.
    Flash,
}

/// Attention of one query.
#[derive(Debug)]
pub(crate) struct Attention<'a> {
    store: &'a Store,
    path: Path,
    config: Config,
    q: Tensor,
    out: Option<Tensor>,
}

impl<'a> Attention<'a> {
    pub(crate) fn new(store: &'a Store, path: Path, config: Config, queries: &[f32]) -> Result<Self> {
        let shape = (1, config.query_heads(), config.tokens(), config.d);
        let q = Tensor::from_slice(queries, shape, &Device::Cpu)?.to_dtype(store.dtype)?;
        Ok(Self { store, path, config, q, out: None })
    }

    /// Bytes that a run needs beside the store: the stock path repeats keys and values for the group, and widens
    /// what it repeated.
    pub(crate) fn transient(path: Path, config: Config, dtype: DType) -> u64 {
        let times = if path == Path::Stock { config.group as u64 } else { 0 };
        let repeated = if config.group > 1 { config.kv_bytes(dtype.size_in_bytes()) } else { 0 };
        let widened = if dtype == DType::F32 { 0 } else { config.kv_bytes(size_of::<f32>()) };
        times * (repeated + widened)
    }

    fn stock(&self) -> candle_core::Result<Tensor> {
        let (k, v) = (self.repeat(&self.store.k)?, self.repeat(&self.store.v)?);
        // In single precision, as candle-transformers does: weights of long contexts underflow in half.
        let [q, k, v] = [&self.q, &k, &v].map(|x| x.to_dtype(DType::F32));
        let weights = (q?.matmul(&k?.t()?)? * f64::from(self.config.scale()))?;
        candle_nn::ops::softmax_last_dim(&weights)?.matmul(&v?)?.to_dtype(self.store.dtype)
    }

    fn repeat(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let Config { n, d, group, .. } = self.config;
        if group == 1 {
            return Ok(x.clone());
        }
        Tensor::cat(&vec![x; group], 2)?.reshape((1, KV_HEADS * group, n, d))
    }

    fn flash(&self) -> candle_core::Result<Tensor> {
        // It wants [batch, tokens, heads, d], by strides.
        let (q, k, v) =
            (self.q.transpose(1, 2)?, self.store.k.transpose(1, 2)?, self.store.v.transpose(1, 2)?);
        let scale = self.config.scale();
        match self.store.dtype {
            DType::F16 => flash_attn::<f16>(&q, &k, &v, scale, AttnMask::None, None, None),
            _ => flash_attn::<f32>(&q, &k, &v, scale, AttnMask::None, None, None),
        }
    }
}

impl Contestant for Attention<'_> {
    fn label(&self) -> String {
        let path = match self.path {
            Path::Stock => "candle",
            Path::Flash => "c.flash",
        };
        format!("{path} {}", self.store.dtype.as_str())
    }

    fn kind(&self) -> Kind {
        Kind::Peer
    }

    fn bytes(&self) -> u64 {
        self.config.kv_bytes(self.store.dtype.size_in_bytes())
    }

    fn run(&mut self) -> Result<()> {
        self.out = Some(match self.path {
            Path::Stock => self.stock()?,
            Path::Flash => self.flash()?,
        });
        Ok(())
    }

    fn result(&self) -> Result<Option<Vec<f32>>> {
        let out = self.out.as_ref().ok_or("has not run")?;
        Ok(Some(out.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
    }

    fn held(&self, head: usize, side: Side, rows: usize) -> Option<Vec<f32>> {
        let tensor = match side {
            Side::Key => &self.store.k,
            Side::Value => &self.store.v,
        };
        let rows = tensor.get(0).and_then(|t| t.get(head)).and_then(|t| t.narrow(0, 0, rows));
        rows.and_then(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()).ok()
    }
}
