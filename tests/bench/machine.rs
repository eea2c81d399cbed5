//! What the whole machine spends: processor time and memory, read from `/proc`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The unit of `/proc/stat` is 1/100 s on every architecture that we run on (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;
/// Below this share of busy time the machine counts as quiet.
const QUIET: f64 = 0.1;
/// How long one look at the machine takes, and how long it may take to become quiet.
const LOOK: Duration = Duration::from_millis(200);
const SETTLE_LIMIT: Duration = Duration::from_secs(3);

/// The processor time, in seconds, that all processors together have been busy since the machine's start.
pub(crate) fn busy_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    parse_busy(&text).context("/proc/stat has no line about all processors")
}

/// Waits until the machine is quiet, so that the end of one turn does not weigh on the next; not for long, since a machine
/// that others use may never be.
pub(crate) fn settle() -> Result<()> {
    let end = Instant::now() + SETTLE_LIMIT;
    loop {
        let (before, start) = (busy_seconds()?, Instant::now());
        thread::sleep(LOOK);
        let busy = (busy_seconds()? - before) / start.elapsed().as_secs_f64();
        if busy < QUIET || Instant::now() > end {
            return Ok(());
        }
    }
}

/// The memory that the kernel holds for itself, in bytes: slab objects such as sockets, and the buffers of TCP.
pub(crate) fn kernel_memory() -> Result<i64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let slab = kib(&meminfo, "Slab:").context("/proc/meminfo has no line Slab")?;
    let sockstat = fs::read_to_string("/proc/net/sockstat").context("reading /proc/net/sockstat")?;
    let pages = parse_tcp_pages(&sockstat).context("/proc/net/sockstat has no line about TCP")?;
    let page = i64::try_from(rustix::param::page_size()).context("a page of an unheard-of size")?;
    Ok(slab * 1024 + pages * page)
}

/// The memory of a process that no file backs (`RssAnon`), in bytes.
pub(crate) fn anonymous_memory(pid: u32) -> Result<i64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(kib(&status, "RssAnon:").with_context(|| format!("{path} has no line RssAnon"))? * 1024)
}

/// The process and all that descend from it.
pub(crate) fn process_tree(root: u32) -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    let parents: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // A process may end while we look.
            Some((pid, parent(&entry.path())?))
        })
        .collect();
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&pid) = tree.get(next) {
        tree.extend(parents.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| *child));
        next += 1;
    }
    Ok(tree)
}

/// The release of the kernel.
pub(crate) fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The number of processors.
pub(crate) fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn parent(process: &Path) -> Option<u32> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// User, nice, system, irq and softirq; neither idle time, nor waiting, nor what the hypervisor took.
fn parse_busy(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
        return None;
    };
    Some((user + nice + system + irq + softirq) / TICKS_PER_SECOND)
}

fn parse_tcp_pages(sockstat: &str) -> Option<i64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP: "))?;
    let mut words = line.split(' ');
    words.find(|word| *word == "mem")?;
    words.next()?.parse().ok()
}

/// The number on the line of that name.
fn kib(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_out_idle_iowait_and_steal() {
        let stat = "cpu  100 20 300 4000 50 6 70 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(parse_busy(stat), Some(4.96));
        assert_eq!(parse_busy("cpu0 1 1 1 1 1 1 1\n"), None);
        assert_eq!(parse_busy("cpu 1 2 3\n"), None);
    }

    #[test]
    fn memory_is_read_by_name() {
        let sockstat = "sockets: used 90\nTCP: inuse 4 orphan 0 tw 2 alloc 5 mem 17\nUDP: inuse 2 mem 3\n";
        assert_eq!(parse_tcp_pages(sockstat), Some(17));
        assert_eq!(kib("MemFree: 1 kB\nSlab:             856256 kB\n", "Slab:"), Some(856_256));
        assert_eq!(kib("MemFree: 1 kB\n", "Slab:"), None);
    }

    #[test]
    fn this_process_is_in_its_own_tree() {
        let pid = std::process::id();
        assert_eq!(process_tree(pid).unwrap().first(), Some(&pid));
        assert!(anonymous_memory(pid).unwrap() > 0);
        assert!(busy_seconds().unwrap() > 0.0);
    }
}
