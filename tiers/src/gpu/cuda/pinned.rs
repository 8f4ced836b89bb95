//! Host memory that devices reach: which mappings the driver has pinned, and for how many devices of this process.
//!
//! Owns the registrations of the process. The driver pins a range once for all contexts (portable) and refuses to pin it again, so two devices share a registration: the first makes
//! it, the last ends it, and it keeps the context it was made in. Invariant: a mapping lives as long as the driver may touch it; where the driver does not let go of one, it is kept.
//! Leaves to others: when no device touches it any more.

use super::super::{Address, GpuError};
use super::context::Context;
use super::driver::{Refusal, Trouble, check};
use crate::mapping::Mapping;
use cudarc::driver::sys;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// All of the process, by the mapping's first byte. Held while the driver pins, so that two devices do not pin one mapping at once.
static REGISTERED: Mutex<BTreeMap<usize, Registered>> = Mutex::new(BTreeMap::new());

/// One registration.
#[derive(Debug)]
struct Registered {
    /// Before the mapping, because the end of a context ends what the driver does with the memory.
    context: Arc<Context>,
    mapping: Arc<Mapping>,
    devices: usize,
}

/// One device's share.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    /// By the mapping's first byte: its address for the device.
    addresses: HashMap<usize, Address>,
    begins: HashSet<Address>,
}

fn key(mapping: &Arc<Mapping>) -> usize {
    mapping.as_ptr() as usize
}

impl Pinned {
    pub(super) fn pin(&mut self, context: &Arc<Context>, mapping: &Arc<Mapping>) -> Result<Address, Trouble> {
        if let Some(address) = self.addresses.get(&key(mapping)) {
            return Ok(*address);
        }
        let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Vacant(vacant) = all.entry(key(mapping)) {
            register(mapping)?;
            let (context, mapping) = (Arc::clone(context), Arc::clone(mapping));
            vacant.insert(Registered { context, mapping, devices: 0 });
        }
        let mut address = 0;
        // SAFETY: the range is registered, for devices; one address is written; 0 is the only flag.
        let found = check("cuMemHostGetDevicePointer", unsafe {
            sys::cuMemHostGetDevicePointer_v2(&raw mut address, mapping.as_ptr().cast(), 0)
        });
        if let Err(refusal) = found {
            release(&mut all, key(mapping))?;
            return Err(refusal.into());
        }
        all.get_mut(&key(mapping)).expect("just found or made").devices += 1;
        self.addresses.insert(key(mapping), address);
        self.begins.insert(address);
        Ok(address)
    }

    /// Another context may be the thread's afterwards.
    pub(super) fn unpin(&mut self, mapping: &Arc<Mapping>) -> Result<(), Refusal> {
        let Some(address) = self.addresses.remove(&key(mapping)) else { return Ok(()) };
        self.begins.remove(&address);
        leave(key(mapping))
    }

    /// Whether a pinned mapping begins there.
    pub(super) fn begins_at(&self, address: Address) -> bool {
        self.begins.contains(&address)
    }

    /// Ends all of this device's, at its end. Answers with the mappings that the driver did not let go of because the device is lost: they go after its context.
    pub(super) fn clear(&mut self, lost: bool) -> Vec<Arc<Mapping>> {
        let mut left = Vec::new();
        for (key, _) in std::mem::take(&mut self.addresses) {
            if !lost {
                let _ = leave(key); // refused: the registration stays listed, and with it the mapping
                continue;
            }
            let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
            let registered = all.get_mut(&key).expect("a device's pin is registered");
            registered.devices -= 1;
            if registered.devices == 0 {
                left.extend(all.remove(&key).map(|registered| registered.mapping));
            }
        }
        left
    }
}

/// One device less.
fn leave(key: usize) -> Result<(), Refusal> {
    let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_mut(&key).expect("a device's pin is registered").devices -= 1;
    release(&mut all, key)
}

fn register(mapping: &Arc<Mapping>) -> Result<(), Trouble> {
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
    // SAFETY: the range is mapped, and stays so as long as it is registered, because the registration holds the mapping.
    let registered = check("cuMemHostRegister", unsafe {
        sys::cuMemHostRegister_v2(mapping.as_ptr().cast(), mapping.len(), flags)
    });
    registered.map_err(|refusal| {
        if refusal.is_fatal() {
            return refusal.into();
        }
        let reason = format!(
            "{}: {} bytes could not be pinned; raise the limit of locked memory (LimitMEMLOCK=infinity, ulimit -l unlimited), or make DRAM smaller if the machine has no more",
            refusal.reason(),
            mapping.len()
        );
        GpuError::Driver { operation: refusal.operation, reason }.into()
    })
}

/// Ends a registration that no device uses. One that the driver keeps stays listed.
fn release(all: &mut BTreeMap<usize, Registered>, key: usize) -> Result<(), Refusal> {
    let registered = all.get(&key).expect("a registration");
    if registered.devices > 0 {
        return Ok(());
    }
    registered.context.enter()?;
    // SAFETY: registered by `register` with this first byte, and not ended since; by the seam's contract no device touches it any more.
    check("cuMemHostUnregister", unsafe { sys::cuMemHostUnregister(registered.mapping.as_ptr().cast()) })?;
    all.remove(&key);
    Ok(())
}
