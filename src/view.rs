//! Borrowed, strided views of a host's tensors: base slice, element type, and strides for token, head and
//! dimension.
//!
//! *Helps* because hosts keep Q, K and V token-major, head-major, interleaved or transposed; a view reads
//! any of them in place. *Hurts* a little when the dimension stride is not 1: rows are then gathered
//! element by element, once, on the way into the store.

use crate::error::ViewError;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Element type of a tensor or of stored rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: 11 significant bits, largest finite value 65504.
    F16,
    /// bfloat16: the range of `f32`, 8 significant bits.
    Bf16,
}

impl DType {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name used in recipes and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// The elements behind a view.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(s) => s.len(),
            Self::F16(s) => s.len(),
            Self::Bf16(s) => s.len(),
        }
    }
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}
impl<'a> From<&'a [f16]> for Elements<'a> {
    fn from(data: &'a [f16]) -> Self {
        Self::F16(data)
    }
}
impl<'a> From<&'a [bf16]> for Elements<'a> {
    fn from(data: &'a [bf16]) -> Self {
        Self::Bf16(data)
    }
}

/// Extents of a `(token, head, dimension)` tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Tokens.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Elements per head.
    pub dim: usize,
}

/// Steps between neighbours, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// From one token to the next.
    pub token: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one dimension to the next.
    pub dim: usize,
}

impl Strides {
    /// `[token][head][dim]`, dense.
    pub const fn token_major(dims: Dims) -> Self {
        Self { token: dims.heads * dims.dim, head: dims.dim, dim: 1 }
    }

    /// `[head][token][dim]`, dense.
    pub const fn head_major(dims: Dims) -> Self {
        Self { token: dims.dim, head: dims.tokens * dims.dim, dim: 1 }
    }

    /// Elements a slice must have for the largest index to be inside, or `None` on overflow.
    fn required(&self, dims: Dims) -> Option<usize> {
        if dims.tokens == 0 || dims.heads == 0 || dims.dim == 0 {
            return Some(0);
        }
        let last = (dims.tokens - 1)
            .checked_mul(self.token)?
            .checked_add((dims.heads - 1).checked_mul(self.head)?)?
            .checked_add((dims.dim - 1).checked_mul(self.dim)?)?;
        last.checked_add(1)
    }
}

/// A read-only `(token, head, dimension)` tensor of a host.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    data: Elements<'a>,
    dims: Dims,
    strides: Strides,
}

impl<'a> TensorView<'a> {
    /// A view with explicit strides.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if the last element would lie outside `data`.
    pub fn new(data: impl Into<Elements<'a>>, dims: Dims, strides: Strides) -> Result<Self, ViewError> {
        let data = data.into();
        match strides.required(dims) {
            Some(required) if required <= data.len() => Ok(Self { data, dims, strides }),
            required => Err(ViewError::OutOfBounds { dims, strides, required, len: data.len() }),
        }
    }

    /// Dense `[token][head][dim]`.
    ///
    /// # Errors
    /// As [`TensorView::new`].
    pub fn token_major(
        data: impl Into<Elements<'a>>,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<Self, ViewError> {
        let dims = Dims { tokens, heads, dim };
        Self::new(data, dims, Strides::token_major(dims))
    }

    /// Dense `[head][token][dim]`.
    ///
    /// # Errors
    /// As [`TensorView::new`].
    pub fn head_major(
        data: impl Into<Elements<'a>>,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<Self, ViewError> {
        let dims = Dims { tokens, heads, dim };
        Self::new(data, dims, Strides::head_major(dims))
    }

    /// Extents.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::Bf16(_) => DType::Bf16,
        }
    }

    /// Copies one row, widened to `f32`.
    ///
    /// # Panics
    /// If `token` or `head` is outside the view or `out` is not `dim` long.
    pub fn read_row(&self, token: usize, head: usize, out: &mut [f32]) {
        assert!(token < self.dims.tokens && head < self.dims.heads && out.len() == self.dims.dim);
        if self.dims.dim == 0 {
            return;
        }
        let start = token * self.strides.token + head * self.strides.head;
        let step = self.strides.dim;
        let span = start..start + (self.dims.dim - 1) * step + 1;
        match self.data {
            Elements::F32(s) if step == 1 => out.copy_from_slice(&s[span]),
            Elements::F16(s) if step == 1 => s[span].convert_to_f32_slice(out),
            Elements::Bf16(s) if step == 1 => s[span].convert_to_f32_slice(out),
            Elements::F32(s) => strided(out, &s[span], step, |x| x),
            Elements::F16(s) => strided(out, &s[span], step, f16::to_f32),
            Elements::Bf16(s) => strided(out, &s[span], step, bf16::to_f32),
        }
    }
}

fn strided<T: Copy>(out: &mut [f32], row: &[T], step: usize, widen: impl Fn(T) -> f32) {
    // A step of 0 repeats one element (a broadcast dimension).
    if step == 0 {
        out.fill(widen(row[0]));
        return;
    }
    for (o, x) in out.iter_mut().zip(row.iter().step_by(step)) {
        *o = widen(*x);
    }
}

/// The elements behind a mutable view.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl<'a> From<&'a mut [f32]> for ElementsMut<'a> {
    fn from(data: &'a mut [f32]) -> Self {
        Self::F32(data)
    }
}
impl<'a> From<&'a mut [f16]> for ElementsMut<'a> {
    fn from(data: &'a mut [f16]) -> Self {
        Self::F16(data)
    }
}
impl<'a> From<&'a mut [bf16]> for ElementsMut<'a> {
    fn from(data: &'a mut [bf16]) -> Self {
        Self::Bf16(data)
    }
}

/// A writable `(token, head, dimension)` tensor of a host.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    data: ElementsMut<'a>,
    dims: Dims,
    strides: Strides,
}

impl<'a> TensorViewMut<'a> {
    /// A view with explicit strides.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`] if the last element would lie outside `data`;
    /// [`ViewError::Overlapping`] if a stride of 0 would write one element twice.
    pub fn new(data: impl Into<ElementsMut<'a>>, dims: Dims, strides: Strides) -> Result<Self, ViewError> {
        let data = data.into();
        let len = match &data {
            ElementsMut::F32(s) => s.len(),
            ElementsMut::F16(s) => s.len(),
            ElementsMut::Bf16(s) => s.len(),
        };
        let zero = |extent: usize, stride: usize| extent > 1 && stride == 0;
        if zero(dims.tokens, strides.token) || zero(dims.heads, strides.head) || zero(dims.dim, strides.dim) {
            return Err(ViewError::Overlapping { dims, strides });
        }
        match strides.required(dims) {
            Some(required) if required <= len => Ok(Self { data, dims, strides }),
            required => Err(ViewError::OutOfBounds { dims, strides, required, len }),
        }
    }

    /// Dense `[token][head][dim]`.
    ///
    /// # Errors
    /// As [`TensorViewMut::new`].
    pub fn token_major(
        data: impl Into<ElementsMut<'a>>,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<Self, ViewError> {
        let dims = Dims { tokens, heads, dim };
        Self::new(data, dims, Strides::token_major(dims))
    }

    /// Dense `[head][token][dim]`.
    ///
    /// # Errors
    /// As [`TensorViewMut::new`].
    pub fn head_major(
        data: impl Into<ElementsMut<'a>>,
        tokens: usize,
        heads: usize,
        dim: usize,
    ) -> Result<Self, ViewError> {
        let dims = Dims { tokens, heads, dim };
        Self::new(data, dims, Strides::head_major(dims))
    }

    /// Extents.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// Writes one row, narrowed from `f32` (round to nearest even).
    ///
    /// # Panics
    /// If `token` or `head` is outside the view or `row` is not `dim` long.
    pub fn write_row(&mut self, token: usize, head: usize, row: &[f32]) {
        assert!(token < self.dims.tokens && head < self.dims.heads && row.len() == self.dims.dim);
        let start = token * self.strides.token + head * self.strides.head;
        let step = self.strides.dim.max(1);
        match &mut self.data {
            ElementsMut::F32(s) if step == 1 => s[start..start + row.len()].copy_from_slice(row),
            ElementsMut::F16(s) if step == 1 => s[start..start + row.len()].convert_from_f32_slice(row),
            ElementsMut::Bf16(s) if step == 1 => s[start..start + row.len()].convert_from_f32_slice(row),
            ElementsMut::F32(s) => scatter(s, start, step, row, |x| x),
            ElementsMut::F16(s) => scatter(s, start, step, row, f16::from_f32),
            ElementsMut::Bf16(s) => scatter(s, start, step, row, bf16::from_f32),
        }
    }
}

fn scatter<T>(data: &mut [T], start: usize, step: usize, row: &[f32], narrow: impl Fn(f32) -> T) {
    for (i, x) in row.iter().enumerate() {
        data[start + i * step] = narrow(*x);
    }
}
