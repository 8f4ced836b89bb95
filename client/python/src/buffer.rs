//! Memory of Python's objects: whatever has a buffer, or says where its data lies.
//!
//! Owns: from an object to an address and a length that stay valid. Invariants: memory is contiguous, of the length it says, and
//! kept alive (and its buffer locked) while it is used; what lies on a device is staged through the processor's memory.

use crate::error::invalid;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

/// Raw memory, by its address: for engines that hand out pointers.
#[pyclass(frozen, module = "kvd")]
pub(crate) struct Memory {
    #[pyo3(get)]
    ptr: usize,
    #[pyo3(get)]
    bytes: usize,
    _keep: Option<Py<PyAny>>,
}

#[pymethods]
impl Memory {
    /// `keep`: an object whose life keeps the memory valid.
    #[new]
    #[pyo3(signature = (ptr, bytes, keep=None))]
    fn new(ptr: usize, bytes: usize, keep: Option<Py<PyAny>>) -> PyResult<Self> {
        if ptr == 0 {
            return Err(invalid("ptr", "0", "give the address of memory"));
        }
        Ok(Self { ptr, bytes, _keep: keep })
    }

    fn __repr__(&self) -> String {
        format!("Memory({:#x}, {})", self.ptr, self.bytes)
    }
}

/// Some object's memory, for as long as this lives.
pub(crate) struct Held {
    ptr: *mut u8,
    bytes: usize,
    keep: Keep,
}

enum Keep {
    Object {
        _object: Py<PyAny>,
    },
    Buffer {
        _buffer: PyUntypedBuffer,
    },
    /// A copy in the processor's memory of a tensor on a device.
    Staged {
        copy: Py<PyAny>,
        of: Py<PyAny>,
    },
}

// SAFETY: an address and what keeps it valid; Python's objects may move between threads. Whoever writes has been told that the
// memory is for writing; that nobody else uses it meanwhile is the caller's duty, as with any buffer of Python.
unsafe impl Send for Held {}
// SAFETY: as above; sharing it gives raw copies only.
unsafe impl Sync for Held {}

impl Held {
    /// The memory of `object`, which must have exactly `bytes`.
    pub(crate) fn of(object: &Bound<'_, PyAny>, bytes: usize, writable: bool) -> PyResult<Self> {
        let held = if let Ok(memory) = object.cast::<Memory>() {
            let memory = memory.get();
            let keep = Keep::Object { _object: object.clone().unbind() };
            Self { ptr: memory.ptr as *mut u8, bytes: memory.bytes, keep }
        } else if object.hasattr("data_ptr")? {
            Self::of_tensor(object)?
        } else {
            Self::of_buffer(object, writable)?
        };
        if held.bytes != bytes {
            let message = format!("{} bytes where {bytes} are needed", held.bytes);
            return Err(invalid("buffer", message, "give memory of exactly one slot (layout.slot_bytes)"));
        }
        Ok(held)
    }

    fn of_tensor(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        if !tensor.call_method0("is_contiguous")?.is_truthy()? {
            return Err(invalid(
                "tensor",
                "not contiguous",
                "give tensor.contiguous(), or describe it as Pages",
            ));
        }
        let device: String = tensor.getattr("device")?.getattr("type")?.extract()?;
        let copy = if device == "cpu" { tensor.clone() } else { tensor.call_method0("cpu")? };
        let ptr: usize = copy.call_method0("data_ptr")?.extract()?;
        let bytes: usize = copy.getattr("nbytes")?.extract()?;
        let keep = match device.as_str() {
            "cpu" => Keep::Object { _object: copy.unbind() },
            _ => Keep::Staged { copy: copy.unbind(), of: tensor.clone().unbind() },
        };
        Ok(Self { ptr: ptr as *mut u8, bytes, keep })
    }

    fn of_buffer(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object).map_err(|_| {
            let name = object.get_type().name().map_or_else(|_| "it".to_owned(), |name| name.to_string());
            invalid(
                "buffer",
                format!("{name} has no memory"),
                "give bytes, an array, a tensor, or kvd.Memory",
            )
        })?;
        if !buffer.is_c_contiguous() {
            return Err(invalid("buffer", "not contiguous", "give a contiguous array"));
        }
        if writable && buffer.readonly() {
            return Err(invalid("buffer", "read-only", "give a bytearray, an array or a tensor"));
        }
        Ok(Self {
            ptr: buffer.buf_ptr().cast(),
            bytes: buffer.len_bytes(),
            keep: Keep::Buffer { _buffer: buffer },
        })
    }

    /// The bytes to store.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the object is kept alive (and its buffer exported) by `keep`, and has `bytes` from `ptr` on; that nobody writes to
        // it while it is stored is the caller's duty, said in the docstrings. Zero bytes never occur: slots have some.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// Where to load to.
    #[expect(clippy::mut_from_ref, reason = "the memory is not this struct's, and one load has it at a time")]
    pub(crate) fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: as above, of memory that was checked to be writable; each `Held` is used by one read at a time.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }

    /// After a load: to the device, if the memory was staged.
    pub(crate) fn finish(&self, py: Python<'_>) -> PyResult<()> {
        match &self.keep {
            Keep::Staged { copy, of } => of.bind(py).call_method1("copy_", (copy,)).map(|_| ()),
            Keep::Object { .. } | Keep::Buffer { .. } => Ok(()),
        }
    }
}
