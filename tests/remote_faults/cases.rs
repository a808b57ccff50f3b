//! What was a bug of earlier systems of this kind, or what a user may meet: each once, with the real program.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use crtool::remote::{CACHE_SOCKET, PROXY_SOCKET, pb::snapshot_info::State, wire};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::hosts::Host;
use crate::reaper::End;
use crate::site::{CACHE, Ended, LIMIT, PROXY, Site, Way};

/// Time-out of daemons and tools whose peer does not answer, in seconds.
const SOON: &str = "2";

/// A dump straight to the cache of the other host, with another time-out or address.
fn dump_to(site: &Site, address: &str, port: &str, timeout: &str, name: &str) -> Result<Ended, String> {
    let root = site.root();
    let words = ["dump", "-t", &root, "--remote", "-D", name, "-v4", "-o", "dump.log"];
    let way = ["--address", address, "--port", port, "--timeout", timeout];
    site.begin(site.at, &[&words[..], &way].concat())?.end()
}

/// A listener on a host, and what is done with who comes. It ends with the trial.
pub fn listen(site: &Site, host: Host, serve: fn(TcpStream)) -> Result<String, String> {
    site.hosts.enter(host)?;
    let listener = TcpListener::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    site.hosts.leave()?;
    let port = listener.local_addr().map_err(|e| e.to_string())?.port().to_string();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
    Ok(port)
}

/// The dump fails directly and through a proxy, both say why in time, and the tree runs on.
fn useless_peer(site: &mut Site, port: &str) -> Result<(), String> {
    let to = site.at.other();
    dump_to(site, to.ipv4(), port, SOON, "direct")?.failed("")?;
    site.works()?;
    site.daemon(site.at, PROXY, &["--address", to.ipv4(), "--port", port, "--timeout", SOON])?;
    site.begin_dump(Way::Proxied, "proxied")?.end()?.failed("")?;
    site.works()
}

/// The other side takes the connection and says nothing.
pub fn silent_peer(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let port = listen(site, Host::Right, |mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    })?;
    useless_peer(site, &port)
}

/// The other side speaks something else.
pub fn garbage_peer(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let port = listen(site, Host::Right, |mut stream| {
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    })?;
    useless_peer(site, &port)
}

/// The other side is no more than half right: magic, then nonsense.
pub fn half_right_peer(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let port = listen(site, Host::Right, |mut stream| {
        let _ = stream.write_all(&wire::MAGIC);
        let _ = stream.write_all(&[0xff; 4096]);
        let _ = stream.read_to_end(&mut Vec::new());
    })?;
    useless_peer(site, &port)
}

/// Whatever strangers send to the cache, and however many say nothing, a migration goes through beside them.
pub fn strangers_at_the_cache(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    site.daemons(Way::Proxied)?;
    site.hosts.enter(site.at)?;
    let address = (site.at.other().ipv4(), 9996);
    let mut held = Vec::new();
    let mut random = || site.random(256) as u8;
    let noise: Vec<u8> = (0..4096).map(|_| random()).collect();
    let huge = wire::Header {
        kind: wire::Kind::Hello,
        flags: 0,
        stream: 0,
        image: 0,
        len: u32::MAX,
        raw: 7,
        crc: 0,
    };
    let mut bytes =
        vec![noise.clone(), b"GET / HTTP/1.0\r\n\r\n".to_vec(), wire::MAGIC[..5].to_vec(), Vec::new()];
    bytes.push([&wire::MAGIC[..], &noise].concat());
    bytes.push([&wire::MAGIC[..], &huge.encode()].concat());
    bytes.push([&wire::MAGIC[..], &huge.encode()[..11]].concat());
    for bytes in bytes.iter().cycle().take(28) {
        let mut stream = TcpStream::connect(address).map_err(|e| format!("connect to the cache: {e}"))?;
        // It may be closed before all of it is written.
        let _ = stream.write_all(bytes);
        held.push(stream);
    }
    site.hosts.leave()?;
    site.migrate(Way::Proxied, "among strangers")?;
    site.migrate(Way::Direct, "and back")?;
    Ok(())
}

fn local(site: &Site, host: Host, name: &str) -> Result<OwnedFd, String> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(|e| e.to_string())?;
    let address = UnixAddr::new(&site.work_there(host).join(name)).map_err(|e| e.to_string())?;
    connect(fd.as_raw_fd(), &address).map_err(|e| format!("connect to {name}: {e}"))?;
    Ok(fd)
}

/// Local clients that say nothing, or nonsense, are in nobody's way.
pub fn strangers_on_the_host(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    site.daemons(Way::Proxied)?;
    let (from, to) = (site.at, site.at.other());
    let mut held = Vec::new();
    for (host, name) in [(from, PROXY_SOCKET), (to, CACHE_SOCKET)] {
        for number in 0..6 {
            let fd = local(site, host, name)?;
            if number % 2 == 0 {
                let _ = nix::unistd::write(&fd, &[0xff; 100]);
            }
            held.push(fd);
        }
    }
    site.migrate(Way::Proxied, "among strangers").map(drop)
}

/// Users other than the one who started a daemon get nothing from it.
pub fn another_user(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    site.daemons(Way::Proxied)?;
    let (from, to) = (site.at, site.at.other());
    // A copy that everybody may run, in a directory that everybody may enter.
    let tool = site.dir.join("crtool");
    fs::copy(env!("CARGO_BIN_EXE_crtool"), &tool).map_err(|e| e.to_string())?;
    let open = format!("chmod 755 {0} {0}/* && chmod 755 {1}", site.dir.display(), tool.display());
    site.shell(to, &open)?;
    for (host, name, socket) in [(to, CACHE, CACHE_SOCKET), (from, PROXY, PROXY_SOCKET)] {
        let work = site.work(host);
        let ask = format!(
            "setpriv --reuid 65534 --regid 65534 --clear-groups {} {name} status -W {}",
            tool.display(),
            work.display()
        );
        let not = |what: &str| match site.shell(host, &ask) {
            Err(text) if text.contains("Exited(1)") => Ok(()),
            other => Err(format!("{what}, another user asks {name}: {other:?}")),
        };
        site.shell(host, &format!("test $(stat -c %a {}/{socket}) = 600", work.display()))?;
        not("as it is")?;
        // Also if somebody opens the socket to all.
        site.shell(host, &format!("chmod 666 {}/{socket}", work.display()))?;
        not("with the socket open to all")?;
    }
    site.migrate(Way::Proxied, "by the right user")?;
    fs::remove_file(&tool).map_err(|e| e.to_string())
}

/// One of two restores gets the snapshot.
pub fn two_restores(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    for round in 0..6 {
        site.daemons(Way::Proxied)?;
        let name = format!("wanted twice {round}");
        site.begin_dump(Way::Proxied, &name)?.end()?.succeeded()?;
        let words = ["restore", "--remote", "-d", "-D", &name, "--timeout", "1"];
        let (one, two) = (site.begin(site.at.other(), &words)?, site.begin(site.at.other(), &words)?);
        let ends = [one.end()?, two.end()?];
        let well = ends.iter().filter(|e| e.end == End::Exited(0)).count();
        let refused = ends.iter().filter(|e| e.end == End::Exited(1)).count();
        if (well, refused) != (1, 1) {
            return Err(format!("two restores at once ended with {ends:?}"));
        }
        site.arrived()?;
    }
    Ok(())
}

/// A tree that lives on may send snapshots of one name again and again; a tree that is gone has the only one.
pub fn same_name(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    site.daemons(Way::Proxied)?;
    let (from, to) = (site.at, site.at.other());
    let running: Vec<String> = [site.dump_words(Way::Proxied, "name"), vec!["-R".to_owned()]].concat();
    let running: Vec<&str> = running.iter().map(String::as_str).collect();
    for _ in 0..3 {
        site.run(from, &running)?.succeeded()?;
        site.works()?;
    }
    site.begin_dump(Way::Proxied, "name")?.end()?.succeeded()?;
    site.leaves(from)?;
    // Another tree.
    let note = site.dir.join("other.pid");
    let line = format!("setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >{}", note.display());
    site.shell(from, &line)?;
    let other = fs::read_to_string(&note).map_err(|e| e.to_string())?.trim().to_owned();
    site.run(from, &["dump", "-t", &other, "--remote", "-D", "name"])?.failed("name")?;
    site.shell(from, &format!("kill -9 {other}"))?;
    let snapshot = site.snapshot(to, "name");
    if snapshot.as_ref().map(|s| s.state()) != Some(State::Ready) {
        return Err(format!("the refused snapshot has done something to the first one: {snapshot:?}"));
    }
    site.begin_restore("name")?.end()?.succeeded()?;
    site.arrived()
}

/// What does not fit into the cache stays where it is.
pub fn memory_limit(site: &mut Site) -> Result<(), String> {
    site.start_tree(24)?;
    let to = site.at.other();
    site.daemon(to, CACHE, &["--port", "9996", "--max-memory", "8M", "--timeout", SOON])?;
    site.daemons(Way::Proxied)?;
    for (number, way) in [Way::Proxied, Way::Direct, Way::Proxied].into_iter().enumerate() {
        let name = format!("too large {number}");
        site.begin_dump(way, &name)?.end()?.failed("--max-memory")?;
        site.works()?;
        let left = site.snapshot(to, &name).map_or(0, |s| s.resident);
        if left > 0 {
            return Err(format!("{left} bytes of a snapshot that did not fit are still held"));
        }
    }
    site.stop(to, CACHE)?;
    site.daemon(to, CACHE, &["--port", "9996", "--max-memory", "64M"])?;
    site.migrate(Way::Proxied, "it fits now").map(drop)
}

/// The proxy is there first, with a dump that waits, and then the cache.
pub fn proxy_before_cache(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let to = site.at.other();
    site.daemon(site.at, PROXY, &["--address", to.ipv4(), "--port", "9996", "--timeout", "30"])?;
    let dump = site.begin_dump(Way::Proxied, "early")?;
    thread::sleep(Duration::from_millis(300));
    if let Some(ended) = dump.end_within(Duration::ZERO) {
        return Err(format!("the dump did not wait for the cache: {ended:?}"));
    }
    site.daemons(Way::Proxied)?;
    dump.end()?.succeeded()?;
    site.begin_restore("early")?.end()?.succeeded()?;
    site.arrived()
}

/// A restore before there is a snapshot, a dump, or even a cache.
pub fn restore_first(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    let to = site.at.other();
    let words = ["restore", "--remote", "-d", "-D", "expected", "--timeout", "60"];
    site.daemons(Way::Proxied)?;
    let restore = site.begin(to, &words)?;
    thread::sleep(Duration::from_millis(200));
    site.begin_dump(Way::Proxied, "expected")?.end()?.succeeded()?;
    restore.end()?.succeeded()?;
    site.arrived()?;
    // And one for what never comes: it says so in time.
    let begin = Instant::now();
    let words = ["restore", "--remote", "-d", "-D", "never", "--timeout", "1"];
    site.run(to, &words)?.failed("never")?;
    if begin.elapsed() > LIMIT / 2 {
        return Err(format!("a restore with a time-out of 1 s took {:?}", begin.elapsed()));
    }
    Ok(())
}

/// What a daemon needs is taken: it says so at once, in one line.
pub fn taken(site: &mut Site) -> Result<(), String> {
    let host = Host::Right;
    site.daemon(host, CACHE, &["--port", "9996"])?;
    let elsewhere = site.dir.join("elsewhere");
    fs::create_dir(&elsewhere).map_err(|e| e.to_string())?;
    let elsewhere = elsewhere.display().to_string();
    let one_line = |ended: Ended, about: &str| -> Result<(), String> {
        let ended = ended.failed(about)?;
        let errors = ended.said.lines().filter(|line| line.contains("Error")).count();
        if errors == 1 { Ok(()) } else { Err(format!("{errors} errors instead of one: {}", ended.said)) }
    };
    one_line(site.run(host, &[CACHE, "--port", "9996", "-W", &elsewhere])?, "9996")?;
    one_line(site.run(host, &[CACHE, "-d", "--port", "9996", "-W", &elsewhere])?, "9996")?;
    one_line(site.run(host, &[CACHE, "--port", "9997"])?, "another")?;
    one_line(site.run(host, &[CACHE, "--port", "9997", "-W", "/no/such/place"])?, "/no/such/place")?;
    one_line(
        site.run(host, &[CACHE, "--port", "9997", "-W", &elsewhere, "-o", "/no/such/log"])?,
        "/no/such/log",
    )?;
    one_line(
        site.run(host, &[CACHE, "--address", "no-such-host.invalid", "-W", &elsewhere])?,
        "no-such-host.invalid",
    )?;
    one_line(site.run(host, &[CACHE, "--address", "192.0.2.1", "-W", &elsewhere])?, "192.0.2.1")?;
    one_line(site.run(host, &[PROXY, "--address", "a:9996", "-W", &elsewhere])?, "--port")?;
    let left: Vec<_> = fs::read_dir(&elsewhere).map_err(|e| e.to_string())?.flatten().collect();
    if left.is_empty() { Ok(()) } else { Err(format!("daemons that did not start left {left:?}")) }
}

/// A host without a name, a host that is not there, a port where nobody listens.
pub fn nobody_there(site: &mut Site) -> Result<(), String> {
    site.start_tree(0)?;
    dump_to(site, "no-such-host.invalid", "9996", SOON, "a")?.failed("no-such-host.invalid")?;
    site.works()?;
    dump_to(site, site.at.other().ipv4(), "9", SOON, "b")?.failed("")?;
    site.works()?;
    // In our network, but of no host.
    dump_to(site, "10.77.0.99", "9996", SOON, "c")?.failed("10.77.0.99")?;
    site.works()?;
    // No proxy, no cache.
    let quick = ["dump", "-t", &site.root(), "--remote", "--timeout", "1"];
    site.run(site.at, &quick)?.failed("image-proxy")?;
    site.run(site.at, &["restore", "--remote", "--timeout", "1"])?.failed("image-cache")?;
    site.works()
}

/// Work dirs without a free byte, and read-only ones, on both sides: no image is written, so none is missed.
pub fn no_space(site: &mut Site) -> Result<(), String> {
    site.start_tree(8)?;
    let mount = |site: &Site, host: Host| {
        let work = site.work(host);
        site.shell(host, &format!("mount -t tmpfs -o size=64k,mode=755 none {}", work.display()))
    };
    let (from, to) = (site.at, site.at.other());
    mount(site, from)?;
    mount(site, to)?;
    // Their logs are elsewhere: what is open for writing keeps a file system from being made read-only.
    let log = |site: &Site, number: usize| site.dir.join(format!("daemon{number}.log")).display().to_string();
    for (number, (from, to)) in [(from, to), (to, from)].into_iter().enumerate() {
        site.daemon(to, CACHE, &["-o", &log(site, 2 * number)])?;
        site.daemon(from, PROXY, &["--address", to.ipv4(), "-o", &log(site, 2 * number + 1)])?;
    }
    for host in [from, to] {
        let work = site.work(host);
        site.shell(
            host,
            &format!("cat /dev/zero >{0}/full.log 2>/dev/null; test -s {0}/full.log", work.display()),
        )?;
    }
    site.migrate(Way::Proxied, "full")?;
    for host in [from, to] {
        site.shell(host, &format!("rm {}/full.log", site.work(host).display()))?;
    }
    site.daemons(Way::Proxied)?;
    for host in [from, to] {
        site.shell(host, &format!("mount -o remount,ro {}", site.work(host).display()))?;
    }
    let root = site.root();
    // Its log cannot be made: it says so, and nothing has happened.
    site.run(to, &["dump", "-t", &root, "--remote", "-D", "read-only", "-o", "new.log"])?
        .failed("new.log")?;
    site.works()?;
    site.run(to, &["dump", "-t", &root, "--remote", "-D", "read-only"])?.succeeded()?;
    site.run(from, &["restore", "--remote", "-d", "-D", "read-only", "-o", "new.log"])?.failed("new.log")?;
    site.run(from, &["restore", "--remote", "-d", "-D", "read-only"])?.succeeded()?;
    site.arrived()?;
    for host in [from, to] {
        site.shell(host, &format!("mount -o remount,rw {}", site.work(host).display()))?;
    }
    Ok(())
}

/// The cable is out for less than the time-out: nothing has happened. For longer: the tree stays.
pub fn cable(site: &mut Site) -> Result<(), String> {
    site.start_tree(48)?;
    let (from, to) = (site.at, site.at.other());
    let link = |site: &Site, state: &str| site.shell(Host::Left, &format!("ip link set eth0 {state}"));
    slow(site, from, "64mbit")?;
    site.daemon(to, CACHE, &["--port", "9996", "--timeout", "4"])?;
    site.daemon(from, PROXY, &["--address", to.ipv4(), "--port", "9996", "--timeout", "4"])?;
    let dump = site.begin_dump(Way::Proxied, "cut off")?;
    receiving(site, to, "cut off", 4 << 20)?;
    link(site, "down")?;
    let ended = dump.end()?.failed("")?;
    link(site, "up")?;
    site.works().map_err(|e| format!("after {ended:?}: {e}"))?;
    // The cache gives up by itself.
    let begin = Instant::now();
    while site.snapshot(to, "cut off").is_some_and(|s| s.state() != State::Failed) {
        if begin.elapsed() > LIMIT {
            return Err("the cache still waits for what does not come".into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let dump = site.begin_dump(Way::Proxied, "out for a moment")?;
    receiving(site, to, "out for a moment", 4 << 20)?;
    link(site, "down")?;
    thread::sleep(Duration::from_millis(700));
    link(site, "up")?;
    dump.end()?.succeeded()?;
    site.begin_restore("out for a moment")?.end()?.succeeded()?;
    site.arrived()
}

/// Waits until so many bytes have come.
fn receiving(site: &Site, host: Host, name: &str, bytes: u64) -> Result<(), String> {
    let begin = Instant::now();
    loop {
        let snapshot = site.snapshot(host, name);
        if snapshot.as_ref().is_some_and(|s| s.bytes >= bytes) {
            return Ok(());
        }
        if begin.elapsed() > LIMIT {
            return Err(format!("it does not arrive: {snapshot:?}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn slow(site: &Site, host: Host, rate: &str) -> Result<(), String> {
    site.shell(host, &format!("tc qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 200ms"))
}

/// A transfer may take longer than any time-out, as long as bytes come.
pub fn slow_network(site: &mut Site) -> Result<(), String> {
    site.start_tree(24)?;
    let (from, to) = (site.at, site.at.other());
    // Some 8 s for 24 MiB.
    slow(site, from, "24mbit")?;
    site.daemon(to, CACHE, &["--port", "9996", "--timeout", SOON])?;
    site.daemon(from, PROXY, &["--address", to.ipv4(), "--port", "9996", "--timeout", SOON])?;
    let words =
        [site.dump_words(Way::Proxied, "slowly"), vec!["--timeout".to_owned(), SOON.to_owned()]].concat();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = site.run(from, &words)?.succeeded()?;
    if ended.took < Duration::from_secs(3) {
        return Err(format!("the network was not slow: {:?}", ended.took));
    }
    site.begin_restore("slowly")?.end()?.succeeded()?;
    site.arrived()
}

/// A process much larger than what dump and proxy take themselves.
pub fn large(site: &mut Site) -> Result<(), String> {
    const MEBIBYTES: usize = 1024;
    const MOST_KIB: u64 = 96 << 10;
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free =
        info.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    if free.unwrap_or(0) < 4u64 << 20 {
        println!("skipped: less than 4 GiB of memory free");
        return Ok(());
    }
    site.start_tree(MEBIBYTES)?;
    site.daemons(Way::Proxied)?;
    let (from, to) = (site.at, site.at.other());
    let dump = site.begin_dump(Way::Proxied, "large")?;
    let mut most = 0;
    let ended = loop {
        most = most.max(peak(dump.pid));
        if let Some(ended) = dump.end_within(Duration::from_millis(3)) {
            break ended.succeeded()?;
        }
        if ended_late(dump.begin) {
            return Err("the dump hangs".into());
        }
    };
    let proxy = peak(site.pid_of(from, PROXY).unwrap_or(0));
    let cache = peak(site.pid_of(to, CACHE).unwrap_or(0));
    println!("peaks: dump {most} KiB, proxy {proxy} KiB, cache {cache} KiB; dump took {:?}", ended.took);
    if most > MOST_KIB || proxy > MOST_KIB {
        return Err(format!("peaks: dump {most} KiB, proxy {proxy} KiB, more than {MOST_KIB} KiB"));
    }
    site.begin_restore("large")?.end()?.succeeded()?;
    site.arrived()
}

fn ended_late(begin: Instant) -> bool {
    begin.elapsed() > 3 * LIMIT
}

/// Most memory that a process has had, in KiB.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
