//! One call: uploads, dispatches, copies and what the host reads afterwards, as one submission.
//!
//! A call is recorded first and encoded at the end, because only then the size of its one upload buffer is
//! known. *Helps* keep a kernel's host half to a list of facts. *Hurts* by one pass over that list, which is
//! short.

use super::Context;
use crate::error::DeviceError;
use std::sync::mpsc;
use std::time::Duration;

/// Uniforms and storage bindings start at multiples of this (the default limit of both).
const ALIGN: usize = 256;

/// What fills buffers that nothing has written yet: a NaN that no arithmetic produces.
const POISON: u32 = 0x7fc0_dead;

/// How long the news that a finished submission's results can be read may take.
const DELIVERY: Duration = Duration::from_secs(30);

/// A device buffer that lives as long as a call: intermediate or result.
#[derive(Clone, Debug)]
pub(crate) struct Scratch {
    buffer: wgpu::Buffer,
    bytes: u64,
}

impl Scratch {
    /// The buffer, for copies into pages.
    pub(crate) fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }
}

/// What a shader sees at one binding.
#[derive(Clone, Debug)]
pub(crate) enum Binding {
    /// A part of the call's upload.
    Upload { offset: usize, bytes: usize },
    /// A whole intermediate or result.
    Scratch(Scratch),
    /// A slab of pages.
    Slab(wgpu::Buffer),
}

impl From<&Scratch> for Binding {
    fn from(scratch: &Scratch) -> Self {
        Self::Scratch(scratch.clone())
    }
}

#[derive(Debug)]
enum Step {
    Dispatch {
        pipeline: wgpu::ComputePipeline,
        bindings: Vec<Binding>,
        groups: (u32, u32),
        name: &'static str,
    },
    Copy {
        from: wgpu::Buffer,
        source: u64,
        to: wgpu::Buffer,
        target: u64,
        bytes: u64,
    },
}

/// A submission being put together.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    context: &'a Context,
    operation: &'static str,
    upload: Vec<u8>,
    steps: Vec<Step>,
    scratch: Vec<Scratch>,
    loads: Vec<(Scratch, Vec<u32>)>,
    reads: Vec<Scratch>,
}

/// What a finished call brought back, in the order it was asked for.
#[derive(Debug)]
pub(crate) struct ReadBack {
    words: Vec<u32>,
    starts: Vec<(usize, usize)>,
}

impl ReadBack {
    /// Result `index` as words.
    pub(crate) fn words(&self, index: usize) -> &[u32] {
        let (start, len) = self.starts[index];
        &self.words[start..start + len]
    }

    /// Result `index` as floats.
    pub(crate) fn floats(&self, index: usize) -> &[f32] {
        bytemuck::cast_slice(self.words(index))
    }
}

impl<'a> Call<'a> {
    /// An empty call; `operation` is its name in errors.
    pub(crate) fn new(context: &'a Context, operation: &'static str) -> Self {
        Self {
            context,
            operation,
            upload: Vec::new(),
            steps: Vec::new(),
            scratch: Vec::new(),
            loads: Vec::new(),
            reads: Vec::new(),
        }
    }

    /// Brings data to the device.
    pub(crate) fn upload<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Binding {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let offset = self.upload.len();
        self.upload.extend_from_slice(bytes);
        // An empty binding is not allowed, and a struct must fit whole.
        let end = self.upload.len().max(offset + 64).next_multiple_of(ALIGN);
        self.upload.resize(end, 0);
        Binding::Upload { offset, bytes: bytes.len().max(64).next_multiple_of(16) }
    }

    /// Room for `len` words of intermediate or result data. Its contents are undefined.
    pub(crate) fn scratch(&mut self, len: usize) -> Scratch {
        use wgpu::BufferUsages as Usage;
        let bytes = (4 * len as u64).max(64).next_multiple_of(16);
        let usage = Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST;
        let scratch = Scratch { buffer: self.context.take_buffer(usage, bytes), bytes };
        self.scratch.push(scratch.clone());
        scratch
    }

    /// Scratch that starts out holding `data`.
    pub(crate) fn load(&mut self, data: &[f32]) -> Scratch {
        let scratch = self.scratch(data.len());
        self.loads.push((scratch.clone(), bytemuck::cast_slice(data).to_vec()));
        scratch
    }

    /// Runs `count` workgroups of a shader: binding 0 is `uniform`, the others follow.
    pub(crate) fn dispatch<U: bytemuck::NoUninit>(
        &mut self,
        shader: &'static str,
        constants: &[(&'static str, u32)],
        uniform: &U,
        bindings: &[Binding],
        count: usize,
    ) -> Result<(), DeviceError> {
        if count == 0 {
            return Ok(());
        }
        let groups = u32::try_from(count).map_err(|_| DeviceError::Limit {
            what: self.operation,
            need: count as u64,
            limit: u64::from(u32::MAX),
            hint: "split the call",
        })?;
        let context = self.context;
        let pipeline = context.guarded(self.operation, || context.pipeline(shader, constants))?;
        let uniform = self.upload(std::slice::from_ref(uniform));
        let bindings = std::iter::once(uniform).chain(bindings.iter().cloned()).collect();
        self.steps.push(Step::Dispatch { pipeline, bindings, groups: context.groups(groups), name: shader });
        Ok(())
    }

    /// Copies `bytes` from scratch into a slab.
    pub(crate) fn copy(&mut self, from: &Scratch, source: u64, to: &wgpu::Buffer, target: u64, bytes: u64) {
        if bytes > 0 {
            self.steps.push(Step::Copy {
                from: from.buffer().clone(),
                source,
                to: to.clone(),
                target,
                bytes,
            });
        }
    }

    /// Asks for `scratch` on the host.
    pub(crate) fn read(&mut self, scratch: &Scratch) {
        self.reads.push(scratch.clone());
    }

    /// Submits, and if anything was asked for waits and brings it back.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] whatever goes wrong: results are handed out only after the device confirmed
    /// that it finished.
    pub(crate) fn finish(self) -> Result<ReadBack, DeviceError> {
        let (context, operation) = (self.context, self.operation);
        let total: u64 = self.reads.iter().map(|r| r.bytes).sum();
        let staging = context.guarded(operation, || self.submit(total))?;
        let Some(staging) = staging else { return Ok(ReadBack { words: Vec::new(), starts: Vec::new() }) };

        let lost = |reason: String| DeviceError::Lost { operation, reason };
        let (send, receive) = mpsc::channel();
        let words = context.guarded(operation, || {
            staging.map_async(wgpu::MapMode::Read, 0..total, move |result| {
                // The receiver waits below; if it is gone nobody asks for the result.
                let _ = send.send(result);
            });
            context.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| lost(e.to_string()))?;
            // Another thread's poll may have taken our callback along and not run it yet.
            match receive.recv_timeout(DELIVERY) {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return Err(lost(e.to_string())),
                Err(_) => return Err(lost("the results were never delivered".to_owned())),
            }
            let view = staging.get_mapped_range(0..total).map_err(|e| lost(e.to_string()))?;
            let words = bytemuck::pod_collect_to_vec::<u8, u32>(&view);
            drop(view);
            staging.unmap();
            Ok(words)
        })??;
        let mut starts = Vec::with_capacity(self.reads.len());
        let mut start = 0;
        for read in &self.reads {
            let len = read.bytes as usize / 4;
            starts.push((start, len));
            start += len;
        }
        context.give_buffer(staging);
        Ok(ReadBack { words, starts })
    }

    /// Encodes and submits; the buffer to map if anything is to be read.
    fn submit(&self, total: u64) -> Option<wgpu::Buffer> {
        use wgpu::BufferUsages as Usage;
        let context = self.context;
        let usage = Usage::STORAGE | Usage::UNIFORM | Usage::COPY_DST;
        let upload = context.take_buffer(usage, self.upload.len() as u64);
        if !self.upload.is_empty() {
            context.queue.write_buffer(&upload, 0, &self.upload);
        }
        if context.poison {
            for scratch in &self.scratch {
                let fill = vec![POISON; scratch.bytes as usize / 4];
                context.queue.write_buffer(&scratch.buffer, 0, bytemuck::cast_slice(&fill));
            }
        }
        for (scratch, data) in &self.loads {
            context.queue.write_buffer(&scratch.buffer, 0, bytemuck::cast_slice(data));
        }
        let staging = (total > 0).then(|| context.take_buffer(Usage::MAP_READ | Usage::COPY_DST, total));
        let mut encoder = context
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(self.operation) });
        self.encode(&mut encoder, &upload);
        if let Some(staging) = &staging {
            let mut at = 0;
            for read in &self.reads {
                encoder.copy_buffer_to_buffer(&read.buffer, 0, staging, at, read.bytes);
                at += read.bytes;
            }
        }
        context.memory.submit(context, Some(encoder.finish()));
        context.give_buffer(upload);
        for scratch in &self.scratch {
            context.give_buffer(scratch.buffer.clone());
        }
        staging
    }

    fn encode(&self, encoder: &mut wgpu::CommandEncoder, upload: &wgpu::Buffer) {
        let mut steps = self.steps.iter().peekable();
        while let Some(step) = steps.peek() {
            if let Step::Copy { from, source, to, target, bytes } = step {
                encoder.copy_buffer_to_buffer(from, *source, to, *target, *bytes);
                steps.next();
                continue;
            }
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some(self.operation),
                timestamp_writes: None,
            });
            while let Some(Step::Dispatch { pipeline, bindings, groups, name }) =
                steps.next_if(|s| matches!(s, Step::Dispatch { .. }))
            {
                let entries: Vec<wgpu::BindGroupEntry<'_>> = bindings
                    .iter()
                    .enumerate()
                    .map(|(index, binding)| wgpu::BindGroupEntry {
                        binding: index as u32,
                        resource: wgpu::BindingResource::Buffer(resource(binding, upload)),
                    })
                    .collect();
                let group = self.context.device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(name),
                    layout: &pipeline.get_bind_group_layout(0),
                    entries: &entries,
                });
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, &group, &[]);
                pass.dispatch_workgroups(groups.0, groups.1, 1);
            }
        }
    }
}

fn resource<'b>(binding: &'b Binding, upload: &'b wgpu::Buffer) -> wgpu::BufferBinding<'b> {
    match binding {
        Binding::Upload { offset, bytes } => wgpu::BufferBinding {
            buffer: upload,
            offset: *offset as u64,
            size: wgpu::BufferSize::new(*bytes as u64),
        },
        Binding::Scratch(scratch) => wgpu::BufferBinding {
            buffer: &scratch.buffer,
            offset: 0,
            size: wgpu::BufferSize::new(scratch.bytes),
        },
        Binding::Slab(buffer) => wgpu::BufferBinding { buffer, offset: 0, size: None },
    }
}
