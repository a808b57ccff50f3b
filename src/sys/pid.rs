//! Ids of processes, threads, groups and sessions, with the pid namespace that gives them their meaning.
//!
//! The same task has one id in each pid namespace that it is visible in. crtool meets two of them: the one in which it
//! runs itself, and the one of the tree. Where both are the same namespace the numbers are equal, and a mistake would
//! not show; so each has its own type, and `process_tree/ids.rs` turns one into the other. One place does not: names below
//! `/proc/PID`, which go into images as they are (`files/procfs.rs`).

use std::fmt;

macro_rules! pid_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(i32);

        impl $name {
            /// No id: what the kernel says where there is none, or none that is visible in this pid namespace.
            pub const NONE: Self = Self(0);

            /// The id with this number.
            pub const fn new(number: i32) -> Self {
                Self(number)
            }

            /// Its number, for a system call, a message or an image.
            pub const fn get(self) -> i32 {
                self.0
            }

            /// Its number as images have it.
            pub const fn bits(self) -> u32 {
                self.0.cast_unsigned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

pid_type! {
    /// An id as the pid namespace has it in which crtool runs: what ptrace(2), kill(2) and /proc of crtool take and tell.
    HostPid
}

impl HostPid {
    /// That of crtool.
    pub fn own() -> Self {
        Self(std::process::id().cast_signed())
    }
}

pid_type! {
    /// An id as the pid namespace of the tree has it: what images say, what tasks of the tree see, and what system calls take
    /// that a task of the tree makes.
    NsPid
}
