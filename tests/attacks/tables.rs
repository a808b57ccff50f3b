//! Descriptor tables after a restore: what a task had, and nothing of crtool's.

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use crate::{
    site::{Site, Verdict, clear, differences, fail, numbers, others, ready, until, word},
    sys,
};

/// Every way to share a descriptor table, or root and current directory, that a tree may have. A child with one of these
/// flags is made by the process or, below `A`, by a child of it.
const SHAPES: [&str; 7] = [
    "child",
    "sibling",
    "grandchildren",
    "siblings-of-siblings",
    "fs-sibling",
    "with-memory",
    "left-by-its-maker",
];

/// For every shape: a restore gives exactly the descriptors that there were, or the dump says that it cannot.
pub fn shapes(site: &mut Site) -> Verdict {
    let mut wrong = String::new();
    let mut made = 0;
    for shape in SHAPES {
        site.fresh_images();
        let mut tree = site.play("sharing", shape)?;
        let before = descriptors();
        let run = site.run(&["dump", "-t", &tree.pid.to_string()]);
        run.ended_well()?;
        if run.status == 0 {
            tree.until_ended()?;
            let run = site.run(&["restore", "-d"]);
            run.succeeded(&format!("restore of {shape}"))?;
            let differ = differences(&before, &descriptors());
            if !differ.is_empty() {
                wrong += &format!("{shape}:\n{differ}");
            }
            made += 1;
        }
        drop(tree);
        clear(&[]);
        until("the tree is gone", || others().is_empty())?;
    }
    if made < 3 {
        return fail(format!("only {made} shapes can be dumped"));
    }
    if wrong.is_empty() { Ok(()) } else { fail(wrong) }
}

/// Where the descriptors of all tasks lead.
fn descriptors() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for pid in others() {
        let dir = format!("/proc/{pid}/fd");
        for fd in numbers(&dir) {
            let link = fs::read_link(Path::new(&dir).join(fd.to_string())).unwrap_or_default();
            // Pipes are new ones.
            let link = link.display().to_string();
            let link = link.split(":[").next().unwrap_or_default().to_owned();
            all.insert(format!("task {pid} descriptor {fd}"), link);
        }
    }
    all
}

pub fn sharing() -> ExitCode {
    nix::unistd::setsid().expect("setsid");
    // What only the first process has.
    let secret = fs::File::open("/etc/hostname").expect("a file");
    let (files, fs_) = (libc::CLONE_FILES | libc::SIGCHLD, libc::CLONE_FS | libc::SIGCHLD);
    let own = || {
        for fd in 3..20 {
            let _ = nix::unistd::close(fd);
        }
        std::mem::forget(fs::File::open("/etc/passwd").expect("a file"));
    };
    match word().as_str() {
        "child" => drop(sys::clone_like_fork(files, || sys::rest())),
        "with-memory" => {
            sys::clone_sharing_memory(files, || sys::rest());
        }
        "left-by-its-maker" => {
            sys::become_subreaper();
            let maker = sys::clone_like_fork(libc::SIGCHLD, || {
                own();
                sys::clone_like_fork(files, || sys::rest());
                sys::clone_like_fork(files, || sys::rest());
                0
            });
            let _ = sys!(SYS_wait4, maker, 0, 0, 0);
        }
        shape => {
            let shape = shape.to_owned();
            sys::fork(move || {
                own();
                match shape.as_str() {
                    "sibling" => drop(sys::clone_like_fork(files | libc::CLONE_PARENT, || sys::rest())),
                    "fs-sibling" => drop(sys::clone_like_fork(fs_ | libc::CLONE_PARENT, || sys::rest())),
                    "grandchildren" => {
                        for _ in 0..2 {
                            sys::clone_like_fork(files, || {
                                sys::clone_like_fork(files, || sys::rest());
                                sys::rest()
                            });
                        }
                    }
                    _ => drop(sys::clone_like_fork(files | libc::CLONE_PARENT, || {
                        sys::clone_like_fork(files | libc::CLONE_PARENT, || sys::rest());
                        sys::rest()
                    })),
                }
                sys::rest()
            });
        }
    }
    std::hint::black_box(&secret);
    ready();
    sys::rest()
}
