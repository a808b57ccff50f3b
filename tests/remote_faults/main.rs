//! What goes wrong on the way of a tree to another host: whoever dies, wherever the connection breaks, the tree runs
//! on one host exactly, or on none with its snapshot still there to be restored. Only with a cache that had it all
//! can it die.
//!
//! One binary, many roles: the harness; the worker of one trial, init of its own pid namespace (`REMOTE_WORKER`); the
//! init of each of its two hosts (`REMOTE_INIT`), which have a pid, mount and network namespace each; what starts a
//! program on a host (`REMOTE_ENTER`); a debugger of the tools (`REMOTE_STEPPER`); and the tree (`REMOTE_TARGET`).
//! Random moments come from a fixed seed; `REMOTE_SEED` takes another, `REMOTE_FACTOR` (say 10) makes all loops that
//! much longer, `CRTOOL_SOAK` is the number of rounds of `soak`, `REMOTE_KEEP` keeps the directories.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

mod ahead;
#[allow(dead_code)] // here nothing comes too early
#[path = "../faults/aim.rs"]
mod aim;
mod cases;
mod cuts;
mod forwarder;
mod hostile;
#[path = "../live/hosts.rs"]
mod hosts;
mod kills;
mod link;
mod once;
#[path = "../real/reaper.rs"]
mod reaper;
mod roles;
mod run_first;
mod signals;
mod site;
mod soak;
#[path = "../faults/stepper.rs"]
mod stepper;
mod steps;
mod sys;
mod target;
mod tree;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use roles::Run;

/// Every trial.
const TRIALS: &[(&str, Run)] = &[
    ("silent_peer", cases::silent_peer),
    ("garbage_peer", cases::garbage_peer),
    ("half_right_peer", cases::half_right_peer),
    ("cache_that_queues_for_ever", hostile::queues),
    ("cache_that_pings_and_does_not_read", hostile::pings),
    ("strangers_at_the_cache", cases::strangers_at_the_cache),
    ("strangers_on_the_host", cases::strangers_on_the_host),
    ("another_user", cases::another_user),
    ("two_restores", cases::two_restores),
    ("same_name", cases::same_name),
    ("memory_limit", cases::memory_limit),
    ("proxy_before_cache", cases::proxy_before_cache),
    ("restore_first", cases::restore_first),
    ("taken", cases::taken),
    ("nobody_there", cases::nobody_there),
    ("no_space", cases::no_space),
    ("cable", cases::cable),
    ("slow_network", cases::slow_network),
    ("far_apart", link::far_apart),
    ("large", cases::large),
    ("soak", soak::soak),
    ("soak_of_migrate", soak::migrate),
    ("dump_killed", kills::dump),
    ("dump_killed_direct", kills::dump_direct),
    ("proxy_killed", kills::proxy),
    ("cache_killed", kills::cache),
    ("cache_killed_direct", kills::cache_direct),
    ("restore_killed", kills::restore),
    ("early_restore_killed", kills::early_restore),
    ("source_of_migrate_killed", run_first::source),
    ("source_of_migrate_killed_proxied", run_first::source_proxied),
    ("proxy_of_migrate_killed", run_first::proxy),
    ("cache_of_migrate_killed", run_first::cache),
    ("cache_of_migrate_killed_proxied", run_first::cache_proxied),
    ("restore_of_migrate_killed", run_first::restore),
    ("migrate_disturbed_at_every_kind_of_frame", run_first::kinds),
    ("the_destination_knows_better", run_first::knows_better),
    ("the_destination_knows_better_proxied", run_first::knows_better_proxied),
    ("settle_killed", run_first::settle_killed),
    ("members_die_while_stopped", signals::members_die),
    ("what_was_stopped_is_taken_back", signals::taken_back),
    ("who_cannot_end_asks_on_after_ctrl_c", signals::asked_on),
    ("what_was_stopped_is_thawed", signals::thawed),
    ("what_was_stopped_is_settled_from_above", signals::settled_from_above),
    ("many_dead_destinations", signals::many_dead_destinations),
    ("dump_at_every_step", steps::dump),
    ("dump_at_every_step_direct", steps::dump_direct),
    ("restore_at_every_step", steps::restore),
    ("let_go_once", once::ends),
    ("let_go_once_without_root", once::root_leaves),
    ("killed_at_every_kind_of_frame", steps::kinds),
    ("cut_at_every_kind_of_frame", cuts::kinds),
    ("cut_at_random_frames", cuts::random),
    ("cut_at_random_frames_direct", cuts::random_direct),
    ("bits_flipped", cuts::flips),
    ("bytes_one_by_one", cuts::split),
    ("stalled", cuts::stalls),
    ("anyone_killed_while_restore_waits", kills::anyone),
    ("anyone_killed_while_processes_are_made", ahead::anyone),
];

fn main() -> ExitCode {
    if let Some(status) = roles::other_than_harness(TRIALS) {
        return status;
    }
    let mut args = Arguments::from_args();
    // Much of the time they wait for somebody who is dead.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    args.test_threads.get_or_insert((processors * 3).div_ceil(2));
    let trials = TRIALS.iter().map(|&(name, _)| Trial::ignorable_test(name, move || roles::trial(name)));
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
