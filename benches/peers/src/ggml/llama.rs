//! The few calls of llama.cpp that are needed, behind types that cannot be misused: a model, and contexts that tokens
//! of one sequence are fed to.
//!
//! *Helps* because nothing outside this file is unsafe for llama.cpp's sake, and because it is the whole engine that
//! its users run, not one of its operations. *Hurts* comparisons of attention alone: a context tells the time of a whole
//! token only.

#![allow(unsafe_code, reason = "calls into C")]

use super::{Format, Pool};
use crate::contestant::Result;
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::{NonNull, null_mut};

/// The sequence that `llama_batch_get_one` feeds.
const SEQUENCE: sys::llama_seq_id = 0;

/// llama.cpp reports every tensor it loads; only its errors are passed on.
unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level == sys::GGML_LOG_LEVEL_ERROR && !text.is_null() {
        // SAFETY: llama.cpp hands over a string that lives through the call.
        let text = unsafe { CStr::from_ptr(text) };
        eprint!("llama.cpp: {}", text.to_string_lossy());
    }
}

/// The version of the llama.cpp that is linked.
pub(crate) fn version() -> String {
    // SAFETY: a constant string of the build.
    unsafe { CStr::from_ptr(sys::llama_version()) }.to_string_lossy().into_owned()
}

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Model {
    model: NonNull<sys::llama_model>,
}

impl Model {
    /// Loads a GGUF file, its weights as they lie there.
    ///
    /// # Errors
    /// If llama.cpp refuses the file; its reason is on standard error.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let name = CString::new(path.to_string_lossy().as_bytes())?;
        // SAFETY: `log` is as the type demands; the rest are the defaults, and a string that lives through the call.
        let model = unsafe {
            sys::llama_log_set(Some(log), null_mut());
            sys::llama_backend_init();
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            // Weights that llama.cpp repacks for AMX end this version with an illegal instruction where the compiler
            // drops its tile configuration (ggml-org/llama.cpp#26954). Attention multiplies with no weights.
            params.use_extra_bufts = false;
            sys::llama_model_load_from_file(name.as_ptr(), params)
        };
        let model = NonNull::new(model).ok_or_else(|| format!("llama.cpp cannot load {}", path.display()))?;
        Ok(Self { model })
    }

    /// Tokens of the vocabulary.
    pub(crate) fn vocabulary(&self) -> usize {
        // SAFETY: the model is alive, and owns its vocabulary.
        let tokens = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(self.model.as_ptr())) };
        usize::try_from(tokens).unwrap_or_default()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts borrow the model, so none is left.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

/// One sequence and its KV cache.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    context: NonNull<sys::llama_context>,
    vocabulary: usize,
    _borrowed: PhantomData<(&'a Model, &'a Pool)>,
}

impl<'a> Context<'a> {
    /// Room for `entries` tokens, keys and values as `format`, flash attention on; at most `chunk` tokens are fed at
    /// once.
    ///
    /// # Errors
    /// If llama.cpp makes no context; its reason is on standard error.
    pub(crate) fn new(
        model: &'a Model,
        pool: &'a Pool,
        entries: usize,
        chunk: usize,
        format: Format,
    ) -> Result<Self> {
        let (entries, chunk) = (u32::try_from(entries)?, u32::try_from(chunk)?);
        // SAFETY: the defaults with other numbers; model and pool outlive the context (`_borrowed`).
        let context = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = entries;
            params.n_batch = chunk;
            params.n_ubatch = chunk;
            // Only the last token's logits are ever read.
            params.n_outputs_max = 1;
            params.n_threads = pool.threads;
            params.n_threads_batch = pool.threads;
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
            params.type_k = format.1.0;
            params.type_v = format.1.0;
            sys::llama_init_from_model(model.model.as_ptr(), params)
        };
        let context = NonNull::new(context).ok_or("llama.cpp made no context")?;
        // SAFETY: as above. Without a pool of ours, llama.cpp would start threads for each token.
        unsafe { sys::llama_attach_threadpool(context.as_ptr(), pool.pool.as_ptr(), null_mut()) };
        Ok(Self { context, vocabulary: model.vocabulary(), _borrowed: PhantomData })
    }

    /// Feeds tokens after those that are there, and waits until that is done.
    ///
    /// # Errors
    /// llama.cpp's status, if it is not success.
    pub(crate) fn decode(&mut self, tokens: &[u32]) -> Result<()> {
        let mut ids =
            tokens.iter().map(|token| i32::try_from(*token)).collect::<std::result::Result<Vec<_>, _>>()?;
        let count = i32::try_from(ids.len())?;
        // SAFETY: the batch points to `ids`, which live through both calls and which the first copies.
        let status = unsafe {
            let status =
                sys::llama_decode(self.context.as_ptr(), sys::llama_batch_get_one(ids.as_mut_ptr(), count));
            sys::llama_synchronize(self.context.as_ptr());
            status
        };
        if status == 0 { Ok(()) } else { Err(format!("llama_decode's status is {status}").into()) }
    }

    /// Logits of the last token fed.
    ///
    /// # Errors
    /// If nothing was fed.
    pub(crate) fn logits(&mut self) -> Result<Vec<f32>> {
        // SAFETY: the context is alive; -1 is the last row of logits, or none.
        let row = unsafe { sys::llama_get_logits_ith(self.context.as_ptr(), -1) };
        let row = NonNull::new(row).ok_or("llama.cpp has no logits")?;
        // SAFETY: a row has a logit for each token of the vocabulary, and stays until the next call of `decode`.
        Ok(unsafe { std::slice::from_raw_parts(row.as_ptr(), self.vocabulary) }.to_vec())
    }

    /// Tokens fed so far.
    pub(crate) fn tokens(&self) -> usize {
        // SAFETY: the context is alive, and owns its memory.
        let last =
            unsafe { sys::llama_memory_seq_pos_max(sys::llama_get_memory(self.context.as_ptr()), SEQUENCE) };
        usize::try_from(last + 1).unwrap_or_default()
    }

    /// Gives an empty context of the same format this one's tokens.
    ///
    /// # Errors
    /// If llama.cpp copies none or not all.
    pub(crate) fn copy_into(&self, other: &mut Context<'_>) -> Result<()> {
        // SAFETY: the buffer is as large as llama.cpp asks for, and is told to be.
        let state = unsafe {
            let mut state = vec![0_u8; sys::llama_state_seq_get_size(self.context.as_ptr(), SEQUENCE)];
            let (at, room) = (state.as_mut_ptr(), state.len());
            let written = sys::llama_state_seq_get_data(self.context.as_ptr(), at, room, SEQUENCE);
            state.truncate(written);
            state
        };
        // SAFETY: as many bytes as were written.
        let read = unsafe {
            sys::llama_state_seq_set_data(other.context.as_ptr(), state.as_ptr(), state.len(), SEQUENCE)
        };
        if read == 0 || other.tokens() != self.tokens() {
            return Err("llama.cpp did not copy a sequence".into());
        }
        Ok(())
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `llama_init_from_model`, freed once.
        unsafe { sys::llama_free(self.context.as_ptr()) }
    }
}
