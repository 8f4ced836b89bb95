//! A device's primary context: held, and made the calling thread's own when it is not.
//!
//! Owns one retention of the primary context. Invariant: it is given back when the last of those who hold this is gone, so nothing that lives in the context outlives it.
//! The primary one, because whatever else in this process uses CUDA uses it too, and because memory of other processes may be opened by one context of each device only.
//! Leaves to others: everything in it.

use super::driver::{Refusal, check};
use cudarc::driver::sys;

/// One retention.
#[derive(Debug)]
pub(in crate::gpu) struct Context {
    raw: sys::CUcontext,
    pub(super) device: sys::CUdevice,
}

// SAFETY: a context is a handle that the driver lets any thread use; what must be bound to a thread is bound by `enter`.
unsafe impl Send for Context {}
// SAFETY: as above; nothing in here changes.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of a device that the driver has named.
    pub(super) fn retain(device: sys::CUdevice) -> Result<Self, Refusal> {
        let flags = sys::CUctx_flags::CU_CTX_SCHED_BLOCKING_SYNC as u32;
        // So that who waits sleeps. Where somebody in this process holds the context already the flags are its own, and may be refused to us.
        // SAFETY: `device` is one of the driver's.
        let _ = unsafe { sys::cuDevicePrimaryCtxSetFlags_v2(device, flags) };
        let mut raw = std::ptr::null_mut();
        // SAFETY: as above; it writes one handle.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        Ok(Self { raw, device })
    }

    /// Makes it the calling thread's. Asking is a read of a thread's variable; setting is not.
    pub(in crate::gpu) fn enter(&self) -> Result<(), Refusal> {
        if current() == Some(self.raw) {
            return Ok(());
        }
        // SAFETY: the context is retained, so it is there.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }
}

/// The calling thread's context; `None` as well where the driver says that it had one that has ended.
fn current() -> Option<sys::CUcontext> {
    let mut current = std::ptr::null_mut();
    // SAFETY: writes one handle, null if the thread has none.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut current) }).ok().map(|()| current)
}

impl Drop for Context {
    fn drop(&mut self) {
        if current() == Some(self.raw) {
            // So that this thread is not left with a context that may have ended. Another may be; `enter` there sets it anew.
            // SAFETY: null is none.
            let _ = unsafe { sys::cuCtxSetCurrent(std::ptr::null_mut()) };
        }
        // SAFETY: gives back what `retain` took, once; all use goes through `enter`, of whoever still holds it.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
