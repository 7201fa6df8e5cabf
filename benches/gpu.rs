//! Attention of one token on a GPU, against the speed at which that device can read memory at all.
//!
//! `cargo bench --features gpu,testing --bench gpu`, and with other numbers of entries per KV head behind `--`, for
//! devices that are none (`-- 2048 8192`). One layer, 8 KV heads, d 128, G 4. A call is what a host waits for: the plan,
//! queries to the device, every page read once, results back. `stream` is a shader of this file that adds up the words of
//! half a gigabyte. What a call costs that has next to nothing to read is the first line.
//!
//! *Helps* tell a slow shader from a slow device. *Hurts* where entries fit into the device's cache: calls repeat, so
//! the share of `stream` may then be more than all of it.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use kvsieve::backend::{Backend, Gpu};
use kvsieve::device::page::Side;
use kvsieve::device::{Encoding, Format, HeadRows, Packing};
use kvsieve::kernel::AttentionParams;
use kvsieve::kernel::attend::{AttendLane, Share, Workspace};
use kvsieve::testing::Random;
use kvsieve::testing::cache::{CacheSpec, end_position};
use kvsieve::view::DType;
use kvsieve::wgpu;
use std::time::{Duration, Instant};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
/// Entries per KV head unless the command line names others.
const ENTRIES: [usize; 2] = [32 << 10, 128 << 10];

/// The least of a page: what is left of a call is what it costs to make one.
const FEW: usize = 64;

/// Buffers that `stream` reads: each as large as a shader of a device with default limits may see, and together more
/// than any cache.
const BUFFERS: usize = 4;
const BUFFER_BYTES: u64 = 128 << 20;

/// Passes over them in one submission, so that submitting and waiting are not what is measured.
const PASSES: usize = 16;

/// Threads are enough to fill a large device; neighbours read neighbouring vectors, eight on the way at once.
const STREAM: &str = "
@group(0) @binding(0) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;

const THREADS: u32 = 256u * 2048u;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var a = vec4<u32>(0u);
    for (var i = id.x; i < arrayLength(&words); i += 8u * THREADS) {
        a += words[i] + words[i + THREADS] + words[i + 2u * THREADS] + words[i + 3u * THREADS]
            + words[i + 4u * THREADS] + words[i + 5u * THREADS] + words[i + 6u * THREADS] + words[i + 7u * THREADS];
    }
    sums[id.x] = a.x + a.y + a.z + a.w;
}
";

/// The time at the middle, and the shortest.
fn median(mut run: impl FnMut()) -> (Duration, Duration) {
    for _ in 0..3 {
        run();
    }
    let (mut times, began) = (Vec::new(), Instant::now());
    while times.len() < 10 || (times.len() < 200 && began.elapsed() < Duration::from_secs(2)) {
        let began = Instant::now();
        run();
        times.push(began.elapsed());
    }
    times.sort_unstable();
    (times[times.len() / 2], times[0])
}

/// Bytes per second that the device reads when it does nothing else.
fn stream(device: &wgpu::Device, queue: &wgpu::Queue) -> f64 {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("stream"),
        source: wgpu::ShaderSource::Wgsl(STREAM.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("stream"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let buffer = |size| {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let mut random = Random::new(4);
    let noise: Vec<u64> = (0..1 << 20).map(|_| random.bits()).collect();
    let noise: &[u8] = bytemuck::cast_slice(&noise);
    let groups: Vec<_> = (0..BUFFERS)
        .map(|_| {
            // Sums of their own, or dispatches would wait for one another.
            let (words, sums) = (buffer(BUFFER_BYTES), buffer(4 * 256 * 2048));
            for at in (0..BUFFER_BYTES).step_by(noise.len()) {
                queue.write_buffer(&words, at, noise);
            }
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.get_bind_group_layout(0),
                entries: &[
                    wgpu::BindGroupEntry { binding: 0, resource: words.as_entire_binding() },
                    wgpu::BindGroupEntry { binding: 1, resource: sums.as_entire_binding() },
                ],
            })
        })
        .collect();
    let (_, least) = median(|| {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        for group in groups.iter().cycle().take(PASSES * BUFFERS) {
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(2048, 1, 1);
        }
        drop(pass);
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    });
    (PASSES * BUFFERS) as f64 * BUFFER_BYTES as f64 / least.as_secs_f64()
}

/// Bytes of keys and values that a call over `heads` reads.
fn bytes(heads: &[HeadRows]) -> usize {
    let of_page = |layout: &kvsieve::device::page::PageLayout, rows: usize| {
        (layout.side_bytes(Side::Key) + layout.side_bytes(Side::Value)) * rows / layout.capacity
    };
    heads.iter().flat_map(HeadRows::pages).map(|p| of_page(p.layout, p.rows)).sum()
}

fn attend(gpu: &Gpu, stored: Encoding, entries: usize, stream: f64) {
    let capacity = if stored.packed().is_some() { 128 } else { 64 };
    let spec = CacheSpec::f32(1, DIM, &[entries; HEADS], capacity).typed(stored, stored);
    let heads = spec.build(gpu).unwrap();
    let queries = Random::new(2).rows(HEADS * GROUP * DIM, 1.0, DType::F32);
    let positions = [end_position(&heads)];
    let (mut out, mut lse) = (vec![0.0; HEADS * GROUP * DIM], vec![0.0; HEADS * GROUP]);
    let params = AttentionParams {
        group: GROUP,
        d_k: DIM,
        d_v: DIM,
        scale: 1.0 / (DIM as f32).sqrt(),
        softcap: None,
        window: None,
        sink_logits: None,
    };
    let mut workspace = Workspace::default();
    let (middle, least) = median(|| {
        let lane = AttendLane {
            heads: &heads,
            queries: &queries,
            positions: &positions,
            share: Share::ALL,
            spans: None,
            out: &mut out,
            lse: &mut lse,
            mass: None,
        };
        gpu.attend(&params, &mut [lane], &mut workspace).unwrap();
    });
    assert!(out.iter().all(|x| x.is_finite()), "attention over {stored} is not a number");
    let bytes = bytes(&heads);
    let rate = bytes as f64 / middle.as_secs_f64();
    println!(
        "{entries:>8} {:<22} {:>8.1} {:>9.3} {:>9.3} {:>9.1} {:>9.1} %",
        stored.to_string(),
        bytes as f64 / (1 << 20) as f64,
        1e3 * middle.as_secs_f64(),
        1e3 * least.as_secs_f64(),
        rate / 1e9,
        100.0 * rate / stream,
    );
}

fn main() {
    let named: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let entries = if named.is_empty() { ENTRIES.to_vec() } else { named };

    // The adapter and limits of `Gpu::request`, with the queue in hand.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let options = wgpu::RequestAdapterOptions {
        power_preference: wgpu::PowerPreference::HighPerformance,
        ..Default::default()
    };
    let adapter = pollster::block_on(instance.request_adapter(&options)).unwrap();
    let (device, queue) = pollster::block_on(adapter.request_device(&Default::default())).unwrap();
    let gpu = Gpu::new(device.clone(), queue.clone()).unwrap();
    println!("{}", gpu.describe());
    let stream = stream(&device, &queue);
    println!("stream: {:.1} GB/s", stream / 1e9);
    println!("\n entries rows                        MiB  ms, half  ms, least    GB/s  of stream");
    let stored: [Encoding; 3] =
        [DType::F16.into(), Packing::new(Format::Int8).into(), Packing::new(Format::Int4).into()];
    attend(&gpu, stored[0], FEW, stream);
    for entries in entries {
        for stored in stored {
            attend(&gpu, stored, entries, stream);
        }
    }
}
