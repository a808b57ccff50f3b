//! What an operator says of a snapshot by its name: it is saved, dropped, or released.
//!
//! Nothing here is done to a tree. An operator decides where nobody else can; what would lose a tree, or run it twice,
//! takes `--force`.

use std::time::Duration;

use super::{Snapshots, label};
use crate::remote::cache::snapshot::{Reader, Snapshot, word};
use crate::remote::handover::Event;
use crate::remote::pb::{self, FailCode, snapshot_info::State};
use crate::remote::{Failure, name};

impl Snapshots {
    fn asked(&self, name: &str) -> Result<(u64, &Snapshot), Failure> {
        name::check_snapshot(name)?;
        let found = self.named(name).and_then(|id| Some((id, self.table.get(id)?)));
        found.ok_or_else(|| self.not_found(name, Duration::ZERO))
    }

    /// Gives a snapshot that is complete and waits to somebody who makes a copy of it.
    pub(crate) fn take_to_save(&mut self, name: &str, saver: Reader) -> Result<u64, Failure> {
        let (id, snapshot) = self.asked(name)?;
        snapshot.not_being_saved()?;
        if !matches!(snapshot.state, State::Ready | State::InDoubt) {
            let text = format!(
                "snapshot {name} cannot be saved: {}; what is READY or IN_DOUBT can",
                word(snapshot.state)
            );
            return Err(Failure::new(FailCode::FailBusy, text));
        }
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.saver = Some(saver);
        }
        Ok(id)
    }

    /// The copy is complete, and where. An error: it is not to be used.
    pub(crate) fn saved(&mut self, id: u64, saved: &pb::Saved) -> Result<(), Failure> {
        self.not_saved(id);
        let Some(snapshot) = self.table.get_mut(id) else {
            return Err(Failure::new(FailCode::FailNotFound, "the snapshot is gone"));
        };
        if !snapshot.is_live() {
            return Err(snapshot.ended());
        }
        tracing::info!("snapshot {} was saved in {}", snapshot.begin.name, label(&saved.directory));
        self.set_saved(id, &saved.directory);
        if saved.drop {
            self.happen(id, Event::Dropped, &format!("saved in {} and dropped", label(&saved.directory)));
        }
        Ok(())
    }

    /// There is a copy in a directory.
    pub(crate) fn set_saved(&mut self, id: u64, directory: &str) {
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.saved = label(directory);
            snapshot.note();
        }
    }

    /// Nobody copies it any more.
    pub(crate) fn not_saved(&mut self, id: u64) {
        self.changes += 1;
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.saver = None;
        }
    }

    /// Frees a snapshot by hand.
    pub(crate) fn drop_by_hand(&mut self, name: &str, force: bool) -> Result<(), Failure> {
        let (id, snapshot) = self.asked(name)?;
        let refuse = |code, text: &str| Err(Failure::new(code, format!("snapshot {name} {text}")));
        let by = |who: Option<Reader>| who.map_or(0, |who| who.pid);
        match snapshot.state {
            _ if snapshot.children > 0 => {
                let text = "is needed by snapshots that build on it; drop them first";
                return refuse(FailCode::FailParent, text);
            }
            State::Starting => return refuse(FailCode::FailBusy, "is being let go just now; ask again"),
            State::Armed => return refuse(FailCode::FailBusy, "is being handed over just now; ask again"),
            _ if force => {}
            State::Restoring => {
                let pid = by(snapshot.reader);
                let text = format!("is being restored by pid {pid}; --force drops it all the same");
                return refuse(FailCode::FailBusy, &text);
            }
            State::Prepared => {
                let text = "is being handed over by its source just now; ask again, or drop it with --force";
                return refuse(FailCode::FailBusy, text);
            }
            _ if snapshot.saver.is_some() => {
                let pid = by(snapshot.saver);
                let text = format!("is being saved by pid {pid}; --force drops it all the same");
                return refuse(FailCode::FailBusy, &text);
            }
            State::Ready if !snapshot.survives && snapshot.saved.is_empty() => {
                let text =
                    "is all there is of its tree, which is gone at the source; --force drops it all the same";
                return refuse(FailCode::FailExists, text);
            }
            _ => {}
        }
        if matches!(snapshot.state, State::Receiving | State::Prepared) {
            self.fail(id, Failure::new(FailCode::FailAborted, "dropped by hand at the cache"));
        } else {
            self.happen(id, Event::Dropped, "dropped by hand");
        }
        Ok(())
    }

    /// What was in doubt is known: it runs nowhere.
    pub(crate) fn release(&mut self, name: &str) -> Result<(), Failure> {
        let (id, snapshot) = self.asked(name)?;
        match snapshot.state {
            State::InDoubt => drop(self.happen(id, Event::Release, "")),
            State::Ready => {}
            state => {
                let text = format!("snapshot {name} is not in doubt: {}", word(state));
                return Err(Failure::new(FailCode::FailBusy, text));
            }
        }
        Ok(())
    }
}
