//! A wgpu device of the host, or one of our own: pipelines, page memory and the calls that use them.
//!
//! *Helps* by running on whatever GPU there is with no optional feature: no f16 arithmetic, no subgroups, and
//! WebGPU's default limits. *Hurts* where results return to the host: every call that hands out host slices
//! waits for the device.
//!
//! Nothing of wgpu fails silently here. Every call stands between error scopes, and what the host reads is
//! mapped only after the submission is known to have finished; a device that is lost or refuses work gives
//! [`DeviceError::Lost`] with the name of the operation.

mod call;
mod memory;
pub(crate) mod shader;
mod side;

pub(crate) use call::{Binding, Call, Scratch};
pub use memory::DeviceBlock;
pub(crate) use memory::Memory;
pub(crate) use side::{kind, packs};

use crate::error::DeviceError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks a mutex whose data stays meaningful when a thread panics while it holds the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Values of the overridable constants of a pipeline.
type Constants = Vec<(&'static str, u32)>;

/// Buffers of past calls that wait for the next one.
#[derive(Debug, Default)]
struct Spare {
    buffers: HashMap<(wgpu::BufferUsages, u64), Vec<wgpu::Buffer>>,
    bytes: u64,
}

/// Buffers kept for the next call, at most.
const SPARE_BYTES: u64 = 64 << 20;

/// A device, its queue, and everything compiled or allocated on it.
#[derive(Debug)]
pub(crate) struct Context {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    limits: wgpu::Limits,
    pub(crate) memory: Arc<Memory>,
    modules: Mutex<HashMap<&'static str, wgpu::ShaderModule>>,
    pipelines: Mutex<HashMap<(&'static str, Constants), wgpu::ComputePipeline>>,
    spare: Mutex<Spare>,
    /// What the device reported outside of any call; only for a device of our own.
    fault: Arc<Mutex<Option<String>>>,
    /// Whether intermediate and result buffers are filled with NaN before use.
    poison: bool,
}

impl Context {
    /// Takes a host's device and queue.
    ///
    /// # Errors
    /// [`DeviceError::Limit`] if the device was created with limits below WebGPU's defaults.
    pub(crate) fn new(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self, DeviceError> {
        let limits = device.limits();
        let needs = [
            ("storage buffers per shader stage", limits.max_storage_buffers_per_shader_stage, 8),
            ("workgroup memory", limits.max_compute_workgroup_storage_size, 16 << 10),
            ("invocations per workgroup", limits.max_compute_invocations_per_workgroup, 256),
        ];
        for (what, limit, need) in needs {
            if limit < need {
                return Err(DeviceError::Limit {
                    what,
                    need: u64::from(need),
                    limit: u64::from(limit),
                    hint: "create the device with wgpu::Limits::default() or better",
                });
            }
        }
        Ok(Self {
            info: device.adapter_info(),
            memory: Arc::new(Memory::new(limits.max_storage_buffer_binding_size.min(limits.max_buffer_size))),
            limits,
            device,
            queue,
            modules: Mutex::default(),
            pipelines: Mutex::default(),
            spare: Mutex::default(),
            fault: Arc::default(),
            poison: false,
        })
    }

    /// Picks an adapter (the environment variables of wgpu, such as `WGPU_BACKEND`, count) and opens a device
    /// with default limits.
    ///
    /// # Errors
    /// [`DeviceError::NoAdapter`].
    pub(crate) fn request() -> Result<Self, DeviceError> {
        let refuse = |reason: String| DeviceError::NoAdapter { reason };
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        let adapter =
            pollster::block_on(instance.request_adapter(&options)).map_err(|e| refuse(e.to_string()))?;
        let descriptor = wgpu::DeviceDescriptor { label: Some("kvsieve"), ..Default::default() };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| refuse(e.to_string()))?;
        let context = Self::new(device, queue)?;
        // Only on a device of our own: a host's handlers are the host's.
        let fault = Arc::clone(&context.fault);
        context.device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            lock(&fault).get_or_insert(e.to_string());
        }));
        let fault = Arc::clone(&context.fault);
        context.device.set_device_lost_callback(move |reason, message| {
            lock(&fault).get_or_insert(format!("device lost ({reason:?}): {message}"));
        });
        Ok(context)
    }

    pub(crate) fn set_poison(&mut self, poison: bool) {
        self.poison = poison;
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    pub(crate) fn describe(&self) -> String {
        let i = &self.info;
        format!("{} ({:?}, {} {})", i.name, i.backend, i.driver, i.driver_info)
    }

    /// The most bytes a shader can see at once.
    pub(crate) fn binding_limit(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// Bytes of intermediate and result buffers one submission should stay below.
    pub(crate) fn batch_bytes(&self) -> usize {
        usize::try_from(self.binding_limit() / 2).unwrap_or(usize::MAX).min(64 << 20)
    }

    /// Workgroups in two dimensions, none above the limit.
    fn groups(&self, count: u32) -> (u32, u32) {
        let limit = self.limits.max_compute_workgroups_per_dimension;
        let y = count.div_ceil(limit).max(1);
        (count.div_ceil(y), y)
    }

    /// The compiled pipeline of a shader, from the second use on without work.
    fn pipeline(&self, shader: &'static str, constants: &[(&'static str, u32)]) -> wgpu::ComputePipeline {
        let mut pipelines = lock(&self.pipelines);
        let key = (shader, constants.to_vec());
        if let Some(pipeline) = pipelines.get(&key) {
            return pipeline.clone();
        }
        let mut modules = lock(&self.modules);
        let module = modules.entry(shader).or_insert_with(|| {
            // A shader that does not exist is empty text, which the error scope reports.
            let text = shader::source(shader).unwrap_or_default();
            self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(shader),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            })
        });
        let values: Vec<(&str, f64)> =
            constants.iter().map(|(name, value)| (*name, f64::from(*value))).collect();
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(shader),
            layout: None,
            module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &values,
                // Every kernel writes what it reads.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        pipelines.insert(key, pipeline.clone());
        pipeline
    }

    /// A buffer of at least `bytes`, from a past call if one fits.
    fn take_buffer(&self, usage: wgpu::BufferUsages, bytes: u64) -> wgpu::Buffer {
        // Few sizes, so that buffers fit the next call.
        let size = bytes.max(4096).next_power_of_two().min(self.limits.max_buffer_size).max(bytes);
        let mut spare = lock(&self.spare);
        if let Some(buffer) = spare.buffers.get_mut(&(usage, size)).and_then(Vec::pop) {
            spare.bytes -= size;
            return buffer;
        }
        drop(spare);
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("kvsieve call"),
            size,
            usage,
            mapped_at_creation: false,
        })
    }

    /// Keeps a buffer for later calls. The queue works in order, so it may still be in use by an earlier one.
    fn give_buffer(&self, buffer: wgpu::Buffer) {
        let mut spare = lock(&self.spare);
        if spare.bytes + buffer.size() <= SPARE_BYTES {
            spare.bytes += buffer.size();
            spare.buffers.entry((buffer.usage(), buffer.size())).or_default().push(buffer);
        }
    }

    /// What the device reported outside of any call.
    fn fault(&self, operation: &'static str) -> Result<(), DeviceError> {
        match lock(&self.fault).as_ref() {
            Some(reason) => Err(DeviceError::Lost { operation, reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Submits the page writes that wait.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub(crate) fn flush(&self, operation: &'static str) -> Result<(), DeviceError> {
        self.guarded(operation, || self.memory.submit(self, None))
    }

    /// Runs `work` between error scopes, so that whatever wgpu refuses in it becomes an error of `operation`.
    fn guarded<R>(&self, operation: &'static str, work: impl FnOnce() -> R) -> Result<R, DeviceError> {
        self.fault(operation)?;
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let result = work();
        let errors = [
            pollster::block_on(validation.pop()),
            pollster::block_on(memory.pop()),
            pollster::block_on(internal.pop()),
        ];
        match errors.into_iter().flatten().next() {
            Some(error) => Err(DeviceError::Lost { operation, reason: error.to_string() }),
            None => self.fault(operation).map(|()| result),
        }
    }
}
