//! What restores say: they take a snapshot, also one that arrives still, read it, and let its tree run.
//!
//! Their connections are served in [`local`](crate::remote::cache::local), which also sees what became of a restore that is
//! gone. Whether a tree may run is for the table.

use super::{Snapshots, in_doubt, reason};
use crate::remote::Failure;
use crate::remote::cache::images::Found;
use crate::remote::cache::restorer::Wanted;
use crate::remote::cache::snapshot::{Reader, Snapshot};
use crate::remote::handover::Event;
use crate::remote::pb::{self, FailCode, snapshot_info::State};

impl Snapshots {
    /// From now on a restore is wanted for each snapshot whose source ends its tree last.
    pub(crate) fn restore_all(&mut self) {
        self.wanted = Some(Vec::new());
    }

    /// Whether that is so.
    pub(crate) fn restores(&self) -> bool {
        self.wanted.is_some()
    }

    /// What is wanted, once.
    pub(crate) fn take_wanted(&mut self) -> Vec<Wanted> {
        self.wanted.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// A restore that the cache has started is over without success: nothing comes of a snapshot that it has not taken.
    pub(crate) fn restore_ended(&mut self, id: u64, why: &str) {
        let waits =
            |s: &&Snapshot| s.reader.is_none() && matches!(s.state, State::Receiving | State::Prepared);
        if self.table.get(id).filter(waits).is_some() {
            self.let_go(id, why);
        }
    }

    /// Gives a restore the snapshot that it wants. `None`: it is not there yet. `seen` remembers the one that is
    /// waited for, so that its end is told.
    pub(crate) fn take(
        &mut self,
        wanted: &pb::Get,
        seen: &mut Option<u64>,
        reader: Reader,
    ) -> Result<Option<u64>, Failure> {
        let (name, early) = (wanted.name.as_str(), wanted.early);
        if let Some(ended) = seen.and_then(|id| self.table.get(id)).filter(|s| !s.is_live()) {
            return Err(ended.ended());
        }
        let id = match wanted.id {
            0 => self.named(name),
            drawn => self.live(name).find(|(_, s)| s.begin.id == drawn).map(|(id, _)| id),
        };
        let Some(id) = id else { return Ok(None) };
        let waited = seen.replace(id).is_some();
        let Some(snapshot) = self.table.get_mut(id) else { return Ok(None) };
        snapshot.not_being_saved()?;
        if let Some(first) = snapshot.reader {
            let text = format!("snapshot {name} is being restored by another restore, pid {}", first.pid);
            return Err(Failure::new(FailCode::FailBusy, text));
        }
        match snapshot.state {
            State::Ready => {
                snapshot.reader = Some(reader);
                tracing::info!("snapshot {name} is being restored by pid {}", reader.pid);
                self.happen(id, Event::Take, &format!("by pid {}", reader.pid));
                Ok(Some(id))
            }
            // A source that ends its tree last waits for the restore.
            State::Receiving | State::Prepared
                if early && snapshot.parent.is_none() && snapshot.is_described()
                    || snapshot.begin.run_first && snapshot.state == State::Prepared =>
            {
                snapshot.reader = Some(reader);
                tracing::info!("snapshot {name} is read by pid {} as it arrives", reader.pid);
                Ok(Some(id))
            }
            // Whoever waits already goes on: the source may still come back.
            State::InDoubt if waited => Ok(None),
            State::InDoubt => Err(in_doubt(snapshot)),
            State::Starting => {
                let text =
                    format!("snapshot {name} was restored; what became of its tree is found out just now");
                Err(Failure::new(FailCode::FailBusy, text))
            }
            _ => Ok(None),
        }
    }

    /// Whether the restore that has a snapshot may go on as if it had got it only when it could be restored.
    pub(crate) fn can_be_restored(&self, id: u64) -> Result<bool, Failure> {
        match self.table.get(id) {
            Some(snapshot) if !snapshot.is_live() => Err(snapshot.ended()),
            Some(snapshot) if snapshot.state == State::Prepared => Ok(snapshot.begin.run_first),
            Some(snapshot) => Ok(matches!(snapshot.state, State::Restoring | State::Starting)),
            None => Err(Failure::new(FailCode::FailNotFound, "the snapshot is gone")),
        }
    }

    /// An image for a restore that punches holes where it has read, if that may be: not before the source has
    /// confirmed, and not if others need it. It is read only then.
    pub(crate) fn consume(&mut self, id: u64, name: &str) -> Result<Option<Found>, Failure> {
        if self.table.get(id).is_none_or(|s| s.state != State::Restoring || s.children > 0) {
            return Ok(None);
        }
        let (found, itself) = self.on_images(id, |images| images.consume(name))?;
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.freed |= itself;
            snapshot.note();
        }
        if itself {
            self.consumed.insert(id);
        }
        Ok(Some(found))
    }

    /// An image, or as much of it as there is, if that is so many bytes.
    pub(crate) fn read_part(&mut self, id: u64, name: &str, least: u64) -> Result<Found, Failure> {
        self.on_images(id, |images| images.read_part(name, least))
    }

    /// Looks how much has become free without a word, as restores read.
    pub(crate) fn measure(&mut self) {
        for id in self.consumed.clone() {
            // It fails only where there are no images.
            let _ = self.on_images(id, |images| {
                images.measure();
                Ok(())
            });
        }
    }

    /// The restore has the tree with root `pid` complete, and asks whether to let it go. `false`: not yet.
    pub(crate) fn starting(&mut self, id: u64, pid: i32) -> Result<bool, Failure> {
        let Some(snapshot) = self.table.get_mut(id) else { return Ok(false) };
        match snapshot.state {
            State::InDoubt => return Err(in_doubt(snapshot)),
            _ if !snapshot.is_live() => return Err(snapshot.failure()),
            State::Prepared | State::Restoring => snapshot.restored_pid = pid,
            _ => {}
        }
        let text = match snapshot.state {
            State::Prepared => format!("as pid {pid}, stopped"),
            _ => "the tree is being let go".to_owned(),
        };
        Ok(self.happen(id, Event::Starting, &text).is_some_and(|held| held.may_run()))
    }

    /// The tree runs here.
    pub(crate) fn ran(&mut self, id: u64, pid: i32) {
        let Some(snapshot) = self.table.get_mut(id) else { return };
        let before = std::mem::replace(&mut snapshot.restored_pid, pid);
        let why = Failure::new(FailCode::FailUnknown, format!("runs as pid {pid}"));
        if self.happen_as(id, Event::Ran, &why).is_none_or(|held| held.state != State::Restored)
            && let Some(snapshot) = self.table.get_mut(id)
        {
            snapshot.restored_pid = before;
        }
    }

    /// The restore did not succeed, and why; its tree certainly does not run. The snapshot can be restored again, if it is
    /// whole.
    pub(crate) fn let_go(&mut self, id: u64, why: &str) {
        let why = reason(why);
        let Some(snapshot) = self.table.get(id) else { return };
        let (name, replaced) = (snapshot.begin.name.clone(), snapshot.replaced);
        let text = match snapshot.held().after(Event::Undone).held.state {
            State::Failed if snapshot.freed => {
                format!(
                    "its restore failed after bytes had been freed as they were read (--free-as-read): {why}"
                )
            }
            State::Failed => format!("its restore failed, the tree stays at the source: {why}"),
            _ => format!("a restore failed: {why}"),
        };
        let after = self.happen(id, Event::Undone, &text);
        if after.is_some_and(|held| held.state == State::Ready) {
            if replaced {
                return self.drop_replaced(id);
            }
            tracing::warn!("the restore of snapshot {name} failed, it can be restored again: {why}");
        }
    }

    /// The restore has it no more, but its tree may run: until that is known nobody else gets it.
    pub(crate) fn orphan(&mut self, id: u64) {
        if let Some(snapshot) = self.table.get_mut(id) {
            snapshot.reader = None;
        }
    }

    /// The restore was killed while it let the tree go, and some of that may have run. Kept, and given to nobody before
    /// somebody has looked.
    pub(crate) fn vanished(&mut self, id: u64, why: &str) {
        let mut text = format!("{} while it let the tree go, some of which may have run", reason(why));
        if self.table.get(id).is_some_and(|s| s.freed) {
            text += "; bytes had been freed as they were read (--free-as-read)";
        }
        self.happen_as(id, Event::Vanished, &Failure::new(FailCode::FailInDoubt, text));
    }
}
