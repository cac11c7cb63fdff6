//! One operation per volume at a time. kubelet may ask again while the first call still runs.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::volume::VolumeId;

/// Another call works on this volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("another call for volume {0} is still running")]
pub struct Busy(VolumeId);

/// Which volumes are being worked on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Operations(Arc<Mutex<HashSet<VolumeId>>>);

impl Operations {
    /// Takes the volume, until the guard is dropped.
    pub(crate) fn begin(&self, id: &VolumeId) -> Result<Operation, Busy> {
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        if fresh { Ok(Operation { all: self.clone(), id: id.clone() }) } else { Err(Busy(id.clone())) }
    }
}

/// The right to work on one volume.
#[derive(Debug)]
pub(crate) struct Operation {
    all: Operations,
    id: VolumeId,
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.all.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
