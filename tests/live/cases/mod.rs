//! The rows of the suite, by topic.

mod aio;
mod attacks;
mod attributes;
mod blocked;
mod clocks;
mod cpu;
mod deleted;
mod epoll;
mod files;
mod identity;
mod inotify;
mod locks;
mod mappings;
mod memory;
mod names;
mod pipes;
mod pkeys;
mod private_of_shared;
mod refused;
mod refused_state;
mod shapes;
mod sharing;
mod signals;
mod specials;
mod timers;
mod tree;
mod tty;

use crate::case::Case;

/// Every case, in the order of the topics.
pub fn all() -> impl Iterator<Item = &'static Case> {
    let topics: &'static [&'static [Case]] = &[
        tree::CASES,
        cpu::CASES,
        attributes::CASES,
        blocked::CASES,
        signals::CASES,
        timers::CASES,
        clocks::CASES,
        identity::CASES,
        memory::CASES,
        pkeys::CASES,
        private_of_shared::CASES,
        shapes::CASES,
        sharing::CASES,
        mappings::CASES,
        files::CASES,
        deleted::CASES,
        names::CASES,
        pipes::CASES,
        specials::CASES,
        epoll::CASES,
        inotify::CASES,
        tty::CASES,
        locks::CASES,
        refused::CASES,
        refused_state::CASES,
        attacks::CASES,
        aio::CASES,
    ];
    topics.iter().copied().flatten()
}
