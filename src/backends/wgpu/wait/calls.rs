//! The calls that block the thread, and their forms that do not.

/// A call that blocks the thread.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(target_arch = "wasm32"), expect(dead_code, reason = "only a browser refuses it"))]
pub struct Blocking {
    /// What it does, for messages.
    pub operation: &'static str,
    /// What to call where the thread cannot block.
    pub instead: &'static str,
}

pub const OPENING: Blocking = Blocking { operation: "opening a GPU", instead: "Device::with_config_async" };
pub const WAITING: Blocking =
    Blocking { operation: "waiting for its work", instead: "Device::synchronize_async or Device::time_async" };
pub const READING: Blocking = Blocking {
    operation: "reading memory",
    instead: "Tensor::to_vec_async, DeviceMemory::read_async, or a write of whole u32s",
};
pub const TIMING: Blocking = Blocking { operation: "timing", instead: "Device::time_async" };
