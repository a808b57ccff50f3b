//! How many bytes follow a message, by the message itself.

use super::pb;

/// A message followed by bytes that are no message.
pub trait HasExtra {
    /// Number of those bytes, with padding.
    fn extra_len(&self) -> u64;
}

impl HasExtra for pb::PipeDataEntry {
    fn extra_len(&self) -> u64 {
        u64::from(self.bytes)
    }
}

impl HasExtra for pb::SkPacketEntry {
    fn extra_len(&self) -> u64 {
        u64::from(self.length)
    }
}

impl HasExtra for pb::TcpStreamEntry {
    fn extra_len(&self) -> u64 {
        u64::from(self.inq_len) + u64::from(self.outq_len)
    }
}

impl HasExtra for pb::BpfmapDataEntry {
    fn extra_len(&self) -> u64 {
        u64::from(self.keys_bytes) + u64::from(self.values_bytes)
    }
}

impl HasExtra for pb::IpcSemEntry {
    /// One `u16` per semaphore, padded to 8 bytes.
    fn extra_len(&self) -> u64 {
        (u64::from(self.nsems) * 2).next_multiple_of(8)
    }
}

impl HasExtra for pb::IpcShmEntry {
    /// The segment padded to 4 bytes, where it is not in a pagemap.
    fn extra_len(&self) -> u64 {
        if self.in_pagemaps() { 0 } else { self.size.checked_next_multiple_of(4).unwrap_or(u64::MAX) }
    }
}
