//! Live migration as those use it who type the commands: a process with memory that can be told from any other goes
//! through the daemons, and what runs afterwards looks whether all of it is still right.
//!
//! One binary, two roles: the harness, and the process that is migrated (`REMOTE_USE_TARGET`). All of it is on this
//! host and over its loopback. None runs without root.

#![allow(unreachable_pub)] // a test binary exports nothing: `pub` means "for the other modules"

mod certificates;
mod chain;
mod compress;
mod copies;
mod endings;
mod flushed;
mod given;
mod greedy;
mod manager;
mod offers;
mod program;
mod site;
#[path = "../live/chain.rs"]
mod split;
mod tls;
mod waiting;
mod wrong;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

type Run = fn();

const TRIALS: &[(&str, Run)] = &[
    ("compressed_directly", compress::directly),
    ("compressed_by_a_proxy", compress::by_a_proxy),
    ("what_does_not_get_smaller_goes_as_it_is", compress::noise),
    ("dump_over_a_given_connection", given::dump),
    ("proxy_over_a_given_connection", given::proxy),
    ("cache_over_a_given_connection", given::cache),
    ("daemons_over_given_connections_in_the_background", given::in_the_background),
    ("given_connection_with_tls", given::with_tls),
    ("given_what_is_no_connection", given::what_is_none),
    ("revoked_source", tls::revoked_source),
    ("revoked_cache", tls::revoked_cache),
    ("source_not_named", tls::source_not_named),
    ("cache_not_named", tls::cache_not_named),
    ("certificate_of_a_server_only", tls::certificate_of_a_server_only),
    ("both_named", tls::both_named),
    ("names_have_owners", tls::names_have_owners),
    ("settled_by_its_journal", tls::settled_by_its_journal),
    ("expired_list", tls::expired_list),
    ("list_of_others", tls::list_of_others),
    ("a_restore_waits_and_the_dump_fails", waiting::the_dump_fails),
    ("a_restore_after_a_dump_that_failed", waiting::the_dump_has_failed),
    ("progress_on_a_terminal", waiting::on_a_terminal),
    ("killed_in_a_script", waiting::killed_in_a_script),
    ("interrupted_in_a_script", waiting::interrupted_in_a_script),
    ("pids_of_no_tree", wrong::pids),
    ("addresses_that_are_none", wrong::addresses),
    ("no_root", wrong::no_root),
    ("full_log", wrong::full_log),
    ("full_journal", wrong::full_journal),
    ("interrupted_before_it_is_restored", wrong::interrupted_before_it_is_restored),
    ("daemons_end", waiting::daemons_end),
    ("chain_of_snapshots", chain::restored),
    ("chain_whose_parents_stay", chain::parents_stay),
    ("chain_without_a_parent", chain::no_parent),
    ("two_trees_that_do_not_fit_together", greedy::two_trees),
    ("frames_that_never_end", greedy::frames_that_never_end),
    ("images_without_end", greedy::images_without_end),
    ("what_was_written_is_there_first", flushed::before_the_hand_over),
    ("whoever_dies_slowly_is_not_given_away", flushed::whoever_dies_slowly_is_not_given_away),
    ("a_file_is_missing", offers::a_file_is_missing),
    ("a_pid_is_taken", offers::a_pid_is_taken),
    ("restores_could_not_work", offers::restores_could_not_work),
    ("too_little_memory", offers::too_little_memory),
    ("turns", offers::turns),
    ("a_turn_that_is_not_used", offers::a_turn_that_is_not_used),
    ("saved", copies::saved),
    ("saved_dropped_and_loaded", copies::saved_dropped_and_loaded),
    ("saved_in_doubt", copies::saved_in_doubt),
    ("saved_and_loaded_with_parents", copies::saved_and_loaded_with_parents),
    ("told_to_end_it_waits_for_the_restore", endings::it_waits_for_the_restore),
    ("told_to_end_twice", endings::told_twice),
    ("handed_to_the_next_start", endings::handed_to_the_next_start),
    ("killed_and_started_again", endings::killed),
    ("killed_with_a_restore", endings::killed_with_a_restore),
    ("no_room_at_the_service_manager", endings::no_room_at_the_manager),
    ("spilled", endings::spilled),
    ("spilled_where_nothing_can_be", endings::spilled_where_nothing_can_be),
];

type IsThere = fn() -> bool;

/// What single trials need of the machine.
const NEEDS: &[(&str, &str, IsThere)] = &[
    ("what_was_written_is_there_first", "/dev/fuse and python3", flushed::can_be_tried),
    ("whoever_dies_slowly_is_not_given_away", "/dev/fuse and python3", flushed::can_be_tried),
];

fn main() -> ExitCode {
    if let Some(status) = program::main() {
        return status;
    }
    let args = Arguments::from_args();
    let trials = TRIALS.iter().map(|&(name, run)| {
        Trial::ignorable_test(name, move || {
            if !nix::unistd::geteuid().is_root() {
                return Ok(Completion::ignored_with("needs root"));
            }
            if let Some((_, need, there)) = NEEDS.iter().find(|(trial, ..)| *trial == name)
                && !there()
            {
                return Ok(Completion::ignored_with(format!("needs {need}")));
            }
            run();
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
