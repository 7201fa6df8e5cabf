//! The few calls of ggml that are needed, behind types that cannot be misused: a thread pool, rows of a type,
//! and a graph of one `GGML_OP_FLASH_ATTN_EXT`.
//!
//! *Helps* because nothing outside this file is unsafe for ggml's sake. *Hurts* nothing.

#![allow(unsafe_code, reason = "calls into C")]

use crate::contestant::Result;
use llama_cpp_sys_2 as sys;
use memmap2::MmapMut;
use std::marker::PhantomData;
use std::ptr::{NonNull, null, null_mut};

/// A type of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Type(pub(super) sys::ggml_type);

impl Type {
    pub(super) const F16: Self = Self(sys::GGML_TYPE_F16);
    pub(super) const Q8_0: Self = Self(sys::GGML_TYPE_Q8_0);
    pub(super) const Q4_0: Self = Self(sys::GGML_TYPE_Q4_0);

    /// Bytes of a row of `d`.
    pub(super) fn row_bytes(self, d: usize) -> usize {
        // SAFETY: a table lookup; all three types exist.
        unsafe { sys::ggml_row_size(self.0, d as i64) }
    }

    /// Rows of `d`, packed by ggml.
    pub(super) fn pack(self, rows: &[f32], d: usize) -> Result<MmapMut> {
        let count = rows.len() / d;
        let mut packed = MmapMut::map_anon(count * self.row_bytes(d))?;
        // SAFETY: `packed` holds `count` rows, `rows` has as many; without an importance matrix none is read.
        let written = unsafe {
            sys::ggml_cpu_init();
            sys::ggml_quantize_chunk(
                self.0,
                rows.as_ptr(),
                packed.as_mut_ptr().cast(),
                0,
                count as i64,
                d as i64,
                null(),
            )
        };
        if written == packed.len() { Ok(packed) } else { Err("ggml packed another number of bytes".into()) }
    }

    /// Packed rows of `d`, widened by ggml.
    pub(super) fn unpack(self, packed: &[u8], d: usize) -> Option<Vec<f32>> {
        // SAFETY: ggml returns a pointer into its static table.
        let widen = unsafe { (*sys::ggml_get_type_traits(self.0)).to_float }?;
        let mut out = vec![0.0; packed.len() / self.row_bytes(d) * d];
        // SAFETY: `out` has an element for each one in `packed`, which is whole rows.
        unsafe { widen(packed.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
        Some(out)
    }
}

/// Which instruction sets ggml was compiled for, of those that matter here.
pub(super) fn instruction_sets() -> Vec<(&'static str, bool)> {
    // SAFETY: constants of the build.
    unsafe {
        vec![
            ("avx2", sys::ggml_cpu_has_avx2() != 0),
            ("fma", sys::ggml_cpu_has_fma() != 0),
            ("f16c", sys::ggml_cpu_has_f16c() != 0),
            ("avx512f", sys::ggml_cpu_has_avx512() != 0),
            ("avx512vnni", sys::ggml_cpu_has_avx512_vnni() != 0),
            ("neon", sys::ggml_cpu_has_neon() != 0),
        ]
    }
}

/// ggml's own threads.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(super) pool: NonNull<sys::ggml_threadpool>,
    pub(super) threads: i32,
}

impl Pool {
    /// `threads`, the calling one among them, asleep.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let threads = i32::try_from(threads)?;
        // SAFETY: the parameters live through the call; ggml copies them.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(threads);
            params.paused = true;
            sys::ggml_threadpool_new(&raw mut params)
        };
        Ok(Self { pool: NonNull::new(pool).ok_or("ggml made no thread pool")?, threads })
    }

    /// Awake threads spin for work, as they do between the layers of a model.
    pub(crate) fn awake(&self, awake: bool) {
        // SAFETY: the pool is alive, and idle: whoever computes with it returns only when the work is done.
        unsafe {
            if awake {
                sys::ggml_threadpool_resume(self.pool.as_ptr());
            } else {
                sys::ggml_threadpool_pause(self.pool.as_ptr());
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: graphs and contexts borrow the pool, so none is left.
        unsafe { sys::ggml_threadpool_free(self.pool.as_ptr()) }
    }
}

/// Extents of one attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    pub(super) ty: Type,
    pub(super) d: usize,
    pub(super) n: usize,
    pub(super) tokens: usize,
    pub(super) query_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) scale: f32,
}

/// A graph that was built once and can be computed many times.
#[derive(Debug)]
pub(super) struct Graph<'a> {
    context: NonNull<sys::ggml_context>,
    graph: NonNull<sys::ggml_cgraph>,
    plan: sys::ggml_cplan,
    out: MmapMut,
    /// What the tensors and the plan point into.
    _inputs: [MmapMut; 3],
    _borrowed: PhantomData<(&'a Pool, &'a MmapMut)>,
}

impl<'a> Graph<'a> {
    /// `queries [query heads, tokens, d]`, `keys` and `values` packed `[KV heads, n, d]`; `mask [tokens, n]` in
    /// half precision, or empty where every query sees every entry.
    pub(super) fn new(
        pool: &'a Pool,
        e: Extents,
        queries: &[f32],
        mask: &[half::f16],
        keys: &'a MmapMut,
        values: &'a MmapMut,
    ) -> Result<Self> {
        let mut q = filled(bytemuck::cast_slice(queries))?;
        let mut m = filled(bytemuck::cast_slice(mask))?;
        let mut out = MmapMut::map_anon(size_of_val(queries))?;
        // SAFETY: ggml allocates its descriptions only, in memory of the size it asks for.
        let (context, graph) = unsafe {
            let size = 16 * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead();
            let params = sys::ggml_init_params { mem_size: size, mem_buffer: null_mut(), no_alloc: true };
            let context = NonNull::new(sys::ggml_init(params)).ok_or("ggml made no context")?;
            (context, sys::ggml_new_graph(context.as_ptr()))
        };
        let graph = NonNull::new(graph).ok_or("ggml made no graph")?;
        let tensor = |ty: sys::ggml_type, extents: [usize; 3], data: *const u8, bytes: usize| {
            let [a, b, c] = extents.map(|x| x as i64);
            // SAFETY: the context is alive and has room; the data outlive it (`_inputs`, `_borrowed`).
            unsafe {
                let tensor = sys::ggml_new_tensor_3d(context.as_ptr(), ty, a, b, c);
                assert_eq!(sys::ggml_nbytes(tensor), bytes, "a tensor of ggml's and its data differ in size");
                (*tensor).data = data.cast_mut().cast();
                tensor
            }
        };
        let f32 = sys::GGML_TYPE_F32;
        let q_tensor = tensor(f32, [e.d, e.tokens, e.query_heads], q.as_mut_ptr(), queries.len() * 4);
        let k_tensor = tensor(e.ty.0, [e.d, e.n, e.kv_heads], keys.as_ptr(), keys.len());
        let v_tensor = tensor(e.ty.0, [e.d, e.n, e.kv_heads], values.as_ptr(), values.len());
        let m_tensor = match mask.len() {
            0 => null_mut(),
            len => tensor(sys::GGML_TYPE_F16, [e.n, e.tokens, 1], m.as_mut_ptr(), len * 2),
        };
        // SAFETY: all tensors are of this context; the result has as many elements as the queries.
        let mut plan = unsafe {
            let result = sys::ggml_flash_attn_ext(
                context.as_ptr(),
                q_tensor,
                k_tensor,
                v_tensor,
                m_tensor,
                e.scale,
                0.0,
                0.0,
            );
            assert_eq!(sys::ggml_nbytes(result), out.len(), "ggml's result and its buffer differ in size");
            (*result).data = out.as_mut_ptr().cast();
            sys::ggml_build_forward_expand(graph.as_ptr(), result);
            sys::ggml_graph_plan(graph.as_ptr(), pool.threads, pool.pool.as_ptr())
        };
        let mut work = MmapMut::map_anon(plan.work_size.max(1))?;
        plan.work_data = work.as_mut_ptr();
        Ok(Self { context, graph, plan, out, _inputs: [q, m, work], _borrowed: PhantomData })
    }

    /// Computes it.
    pub(super) fn run(&mut self) -> Result<()> {
        // SAFETY: graph, plan and everything they point to are alive; no one else uses them.
        let status = unsafe { sys::ggml_graph_compute(self.graph.as_ptr(), &raw mut self.plan) };
        if status == sys::GGML_STATUS_SUCCESS {
            Ok(())
        } else {
            Err(format!("ggml's status is {status}").into())
        }
    }

    /// `[tokens, query heads, d]`.
    pub(super) fn out(&self) -> &[f32] {
        bytemuck::cast_slice(&self.out)
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once.
        unsafe { sys::ggml_free(self.context.as_ptr()) }
    }
}

/// A mapping with these bytes (and at least one).
fn filled(bytes: &[u8]) -> Result<MmapMut> {
    let mut map = MmapMut::map_anon(bytes.len().max(1))?;
    map[..bytes.len()].copy_from_slice(bytes);
    Ok(map)
}
