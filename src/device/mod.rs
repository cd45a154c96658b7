//! Devices and the views of their memory. The only layer that turns addresses into slices.

pub mod blocks;
pub mod cuda;
pub mod host;
pub mod layout;
pub mod tensor;
