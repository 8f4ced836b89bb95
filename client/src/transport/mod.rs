//! Ways to the bytes: shared memory here; TCP, RDMA and CUDA IPC come beside it.

pub(crate) mod shm;
mod streaming;
