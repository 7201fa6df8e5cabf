//! The machine in words, and its memory.
//!
//! *Helps* to read a table later, and to leave out what would not fit. *Hurts* nothing; on systems without
//! `/proc` and `/sys` it says that it does not know.

use std::fs::read_to_string;

/// Left to the system whatever is measured.
const RESERVE: u64 = 2 << 30;

/// The processor's name.
pub(crate) fn processor() -> String {
    let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown processor".into(), |(_, name)| name.trim().into())
}

/// Bytes that can still be allocated; `None` where the system does not say.
pub(crate) fn available() -> Option<u64> {
    let info = read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Bytes of the largest cache; `None` where the system does not say.
pub(crate) fn last_level_cache() -> Option<u64> {
    let sizes = (0..6).filter_map(|index| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = read_to_string(path).ok()?;
        text.trim().strip_suffix('K')?.parse::<u64>().ok().map(|kib| kib << 10)
    });
    sizes.max()
}

/// Load average of the last minute, as text.
pub(crate) fn load() -> String {
    let text = read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").into()
}

/// Why `bytes` more would not fit, if so.
pub(crate) fn short_of(bytes: u64) -> Option<String> {
    let free = available()?;
    let mib = |bytes: u64| bytes >> 20;
    (bytes + RESERVE > free).then(|| {
        format!("needs {} MiB, {} MiB are free and {} stay in reserve", mib(bytes), mib(free), mib(RESERVE))
    })
}

/// MiB of the streaming read: well beyond the last-level cache, where memory allows.
pub(crate) fn stream_mib() -> usize {
    let cache = last_level_cache().unwrap_or(64 << 20);
    let most = available().map_or(u64::MAX, |free| free / 4);
    ((4 * cache).min(most) >> 20).max(512) as usize
}
