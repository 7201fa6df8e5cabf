//! The GPU backend: the conformance suite kernel by kernel, and what only a device has: memory that goes
//! back, a host's own device, devices that die.
//!
//! A machine without any adapter fails these tests unless `KVSIEVE_ALLOW_NO_GPU=1`: skipped is not passed.

#![allow(clippy::print_stdout, reason = "what a test took and what it skipped belongs in its log")]

use crate::support::{self, request_gpu, shared_gpu};
use kvsieve::backend::{Backend, Gpu, Reference};
use kvsieve::device::encoding::{Format, Packing};
use kvsieve::error::{DeviceError, KernelError};
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::kernel::AttentionParams;
use kvsieve::kernel::attend::{AttendLane, Share, Workspace};
use kvsieve::kernel::gather::{GatherArgs, GatherTarget};
use kvsieve::testing::cache::{CacheSpec, poisoned};
use kvsieve::testing::conformance::{self, Effort, KernelReport};
use kvsieve::testing::random::Random;
use kvsieve::view::DType;
use kvsieve::wgpu;
use kvsieve::{Budget, Cpu, KvCache};
use std::sync::Arc;

fn conforms(kernel: fn(&dyn Backend, Effort) -> KernelReport) {
    let Some(gpu) = shared_gpu() else { return };
    let report = kernel(&*gpu, Effort::Full);
    assert!(report.passed(), "{}\n{report}", gpu.describe());
}

#[test]
fn storage() {
    // A device of its own: other tests' pages would disturb the accounting.
    let Some(gpu) = request_gpu() else { return };
    let report = conformance::storage(&gpu, Effort::Full);
    assert!(report.passed(), "{report}");
}

#[test]
fn attend() {
    conforms(conformance::attend);
}

#[test]
fn merge_partials() {
    conforms(conformance::merge_partials);
}

#[test]
fn attention_mass() {
    conforms(conformance::attention_mass);
}

#[test]
fn window_scores() {
    conforms(conformance::window_scores);
}

#[test]
fn dot_scores() {
    conforms(conformance::dot_scores);
}

#[test]
fn code_scores() {
    conforms(conformance::code_scores);
}

#[test]
fn weigh_values() {
    conforms(conformance::weigh_values);
}

#[test]
fn nearest() {
    conforms(conformance::nearest);
}

#[test]
fn rebuild() {
    conforms(conformance::rebuild);
}

#[test]
fn attend_factored() {
    conforms(conformance::attend_factored);
}

#[test]
fn linear() {
    conforms(conformance::linear);
}

#[test]
fn merge_rows() {
    conforms(conformance::merge_rows);
}

#[test]
fn row_norms() {
    conforms(conformance::row_norms);
}

#[test]
fn pool() {
    conforms(conformance::pool);
}

#[test]
fn top_k() {
    conforms(conformance::top_k);
}

#[test]
fn pack() {
    conforms(conformance::pack);
}

#[test]
fn gather() {
    conforms(conformance::gather);
}

#[test]
fn rope() {
    conforms(conformance::rope);
}

/// Dense keys of one head.
fn keys(
    backend: &dyn Backend,
    spec: &CacheSpec,
    head: &kvsieve::device::HeadRows,
) -> Result<Vec<f32>, KernelError> {
    let slots: Vec<u32> = (0..head.rows() as u32).collect();
    let (mut keys, mut values) = (poisoned(slots.len() * spec.d_k), poisoned(slots.len() * spec.d_v));
    let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
    backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
    Ok(keys)
}

fn decode(
    backend: &dyn Backend,
    spec: &CacheSpec,
    heads: &[kvsieve::device::HeadRows],
    tokens: usize,
) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
    let group = 3;
    let shape = LayerShape::new(group * heads.len(), heads.len(), spec.d_k);
    let rows = group * heads.len() * tokens;
    let queries = Random::new(5).rows(rows * spec.d_k, 1.0, DType::F32);
    let last = heads[0].rows() as i32;
    let positions: Vec<i32> = (0..tokens as i32).map(|i| last - tokens as i32 + i).collect();
    let (mut out, mut lse) = (poisoned(rows * spec.d_v), poisoned(rows));
    let lane = AttendLane {
        heads,
        queries: &queries,
        positions: &positions,
        share: Share::ALL,
        spans: None,
        out: &mut out,
        lse: &mut lse,
        mass: None,
    };
    backend.attend(&AttentionParams::of(&shape), &mut [lane], &mut Workspace::default())?;
    Ok((out, lse))
}

#[test]
fn a_hosts_device_is_used_and_its_limits_are_checked() {
    let Some(own) = request_gpu() else { return };
    drop(own);
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter =
        pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).unwrap();
    let open = |limits: wgpu::Limits| {
        let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
        pollster::block_on(adapter.request_device(&descriptor)).unwrap()
    };
    let (device, queue) = open(wgpu::Limits::default());
    let gpu = Gpu::new(device, queue).unwrap();
    let spec = CacheSpec::f32(1, 8, &[20], 16);
    let head = spec.build(&gpu).unwrap();
    let want = keys(&Reference::default(), &spec, &spec.build(&Reference::default()).unwrap()[0]).unwrap();
    assert_eq!(keys(&gpu, &spec, &head[0]).unwrap(), want);

    let (device, queue) =
        open(wgpu::Limits { max_storage_buffers_per_shader_stage: 4, ..wgpu::Limits::default() });
    let error = Gpu::new(device, queue).unwrap_err();
    assert!(matches!(error, DeviceError::Limit { need: 8, limit: 4, .. }), "{error}");
}

#[test]
fn a_dead_device_gives_an_error_and_no_zeros() {
    let Some(gpu) = request_gpu() else { return };
    let spec = CacheSpec::f32(1, 16, &[100], 16);
    let heads = spec.build(&gpu).unwrap();
    decode(&gpu, &spec, &heads, 1).unwrap();
    gpu.device().destroy();
    let lost = |e: KernelError| match e {
        KernelError::Device(DeviceError::Lost { operation, reason }) => (operation, reason),
        other => panic!("{other}"),
    };
    let (operation, reason) = lost(decode(&gpu, &spec, &heads, 1).unwrap_err());
    assert_eq!(operation, "attend");
    assert!(!reason.is_empty());
    assert_eq!(lost(keys(&gpu, &spec, &heads[0]).unwrap_err()).0, "gather");
}

#[test]
fn pages_of_another_backend_are_refused() {
    let Some(gpu) = shared_gpu() else { return };
    let spec = CacheSpec::f32(1, 8, &[20], 16);
    let heads = spec.build(&Reference::default()).unwrap();
    let error = decode(&*gpu, &spec, &heads, 1).unwrap_err();
    assert!(matches!(error, KernelError::Unsupported { backend: "gpu", kernel: "attend", .. }), "{error}");
}

#[test]
fn rotations_too_long_for_the_merge_are_refused() {
    let Some(gpu) = shared_gpu() else { return };
    let rotated = Packing::new(Format::Int8).rotated();
    let spec = |d| CacheSpec::f32(3, d, &[20], 16).typed(DType::F32, rotated);
    let on = |backend: &dyn Backend, d| decode(backend, &spec(d), &spec(d).build(backend).unwrap(), 1);
    let (got, want) = (on(&*gpu, 1024).unwrap(), on(&Reference::default(), 1024).unwrap());
    assert!(got.0.iter().zip(&want.0).all(|(a, b)| (a - b).abs() < 1e-4));
    let error = on(&*gpu, 2048).unwrap_err();
    let limit = |e: &KernelError| {
        matches!(e, KernelError::Device(DeviceError::Limit { need: 2048, limit: 1024, .. }))
    };
    assert!(limit(&error), "{error}");
}

#[test]
fn memory_goes_back_slab_by_slab() {
    let Some(gpu) = request_gpu() else { return };
    let spec = CacheSpec::f32(1, 64, &[20_000], 64);
    let mut heads = spec.build(&gpu).unwrap();
    let full = gpu.memory();
    assert!(full.resident >= 20_000 * 64 * 8 && full.reserved >= full.resident);
    // The first half of the pages lies in the first slabs.
    let half = heads[0].segments[0].pages.len() / 2;
    heads[0].segments[0].pages.drain(..half);
    let less = gpu.memory();
    assert!(less.resident < full.resident * 6 / 10);
    assert!(less.reserved < full.reserved, "a slab without pages is given back");
    drop(heads);
    assert_eq!((gpu.memory().resident, gpu.memory().reserved), (0, 0));
    assert_eq!(gpu.memory().peak, full.resident);
}

#[test]
fn bits_do_not_depend_on_where_pages_lie() {
    let Some(gpu) = request_gpu() else { return };
    // Two builds of one cache: the second one's pages fill holes between those of a third, over all slabs.
    let spec = CacheSpec::f32(1, 128, &[3000, 700], 64);
    let straight = spec.build(&gpu).unwrap();
    let want = decode(&gpu, &spec, &straight, 2).unwrap();
    let filler = CacheSpec::f32(2, 128, &[9000], 64);
    let mut filler = filler.build(&gpu).unwrap();
    let mut index = 0;
    filler[0].segments[0].pages.retain(|_| {
        index += 1;
        index % 3 != 0
    });
    let scattered = spec.build(&gpu).unwrap();
    let got = decode(&gpu, &spec, &scattered, 2).unwrap();
    assert!(want.0.iter().zip(&got.0).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert_eq!(want.1, got.1);
}

#[test]
fn threads_may_share_a_backend() {
    let Some(gpu) = shared_gpu() else { return };
    let gpu = &*gpu;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                scope.spawn(move || {
                    let spec = CacheSpec::f32(seed, 32, &[200, 50], 16);
                    let want =
                        decode(&Reference::default(), &spec, &spec.build(&Reference::default()).unwrap(), 2)
                            .unwrap();
                    for _ in 0..5 {
                        let heads = spec.build(gpu).unwrap();
                        let got = decode(gpu, &spec, &heads, 2).unwrap();
                        assert!(got.1.iter().zip(&want.1).all(|(a, b)| (a - b).abs() < 1e-4));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// A prompt and some decode steps through a whole cache: the outputs.
fn replay(backend: Arc<dyn Backend>, recipe: &str, layers: usize, prompt: u64, steps: u64) -> Vec<f32> {
    let layer = LayerShape::new(9, 3, 64);
    let shape = ModelShape::uniform(layers, layer).unwrap();
    let budget = Budget::Tokens(prompt as usize / 4);
    let mut cache =
        KvCache::builder(shape).recipe(recipe).budget(budget).shared_backend(backend).build().unwrap();
    let id = cache.create_sequence();
    let prompt: Vec<u64> = (0..prompt).collect();
    let mut outs: Vec<f32> = support::feed(&mut cache, id, &prompt, prompt.len()).concat();
    for step in 0..steps {
        outs.extend(support::feed(&mut cache, id, &[prompt.len() as u64 + step], 1).concat());
    }
    outs
}

#[test]
fn a_cache_that_evicts_gives_the_same_on_cpu_and_gpu() {
    let Some(gpu) = request_gpu() else { return };
    let gpu: Arc<dyn Backend> = Arc::new(gpu);
    for recipe in
        ["snapkv(window=16)", "h2o+when=chunk+when=over(slack=4)", "streaming(sinks=2)+k=f16+v=bf16"]
    {
        let want = replay(Arc::new(Cpu::default()), recipe, 2, 200, 6);
        let got = replay(Arc::clone(&gpu), recipe, 2, 200, 6);
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{recipe}: {worst}");
    }
    assert_eq!(gpu.memory().resident, 0, "pages of a dropped cache are free");
}
