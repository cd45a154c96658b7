//! A device to test on: a real one if the machine has one, else `tests/cuda/mock_driver.cpp`, which a
//! child process of the test finds through LD_LIBRARY_PATH. Memory is only reached through the driver.

use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::process::Command;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};
use kvmgr::ffi::device::kvmgr_device_count;
use kvmgr::ffi::types::KVMGR_DEVICE_CUDA;

use crate::mock_driver::mock_driver;

/// Set in a child process, which has the mock driver.
const CHILD: &str = "KVMGR_TEST_MOCK";

static ALONE: Mutex<()> = Mutex::new(());

/// Runs `body`, which is the test `name`, where there is a device.
pub fn on_device(name: &str, body: impl FnOnce()) {
    if is_mock() || kvmgr_device_count(KVMGR_DEVICE_CUDA) > 0 {
        // One at a time: what one test does on the legacy stream would break the capture of another.
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        return body();
    }
    let Some(folder) = mock_driver() else { return };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder)
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{errors}", output.status);
    assert!(text.contains("1 passed"), "{name} is not the name of a test:\n{text}");
}

/// Whether the device is the mock.
pub fn is_mock() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Launches so far of kernels whose names start with `prefix`, as the mock counts them; `None` on a device. After
/// "early " those that may start while the kernel before ends.
pub fn num_launches(prefix: &CStr) -> Option<u32> {
    type Count = unsafe extern "C" fn(*const c_char) -> u32;
    // SAFETY: a symbol of the mock with this type, which reads the string.
    is_mock().then(|| unsafe {
        let count = sys::culib().get::<Count>(b"mock_num_launches").unwrap();
        count(prefix.as_ptr())
    })
}

/// Calls that the mock has refused so far; `None` on a device.
pub fn num_failures() -> Option<u32> {
    type Count = unsafe extern "C" fn() -> u32;
    // SAFETY: a symbol of the mock with this type.
    is_mock().then(|| unsafe { sys::culib().get::<Count>(b"mock_num_failures").unwrap()() })
}

/// Of the allocations from now on the mock has no memory for `count` from the `first` on. Answers how many there
/// were since the last call.
pub fn refuse_allocations(first: u32, count: u32) -> u32 {
    type Refuse = unsafe extern "C" fn(u32, u32) -> u32;
    // SAFETY: a symbol of the mock with this type.
    unsafe { sys::culib().get::<Refuse>(b"mock_refuse_allocations").unwrap()(first, count) }
}

#[track_caller]
pub fn check(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

/// Starts the driver; answers the current context.
pub fn start() -> sys::CUcontext {
    // SAFETY: may be called at any time.
    check(unsafe { sys::cuInit(0) });
    current_context()
}

/// A context of the engine, current for this thread while it lives.
#[derive(Debug)]
pub struct Context(sys::CUcontext);

impl Context {
    pub fn new() -> Self {
        let mut context = ptr::null_mut();
        // SAFETY: the driver writes one handle.
        unsafe {
            check(sys::cuInit(0));
            check(sys::cuCtxCreate_v2(&raw mut context, 0, 0));
        }
        Self(context)
    }

    pub fn is_current(&self) -> bool {
        current_context() == self.0
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: our own context.
        unsafe { sys::cuCtxDestroy_v2(self.0) };
    }
}

pub fn current_context() -> sys::CUcontext {
    let mut context = ptr::null_mut();
    // SAFETY: the driver writes one handle.
    check(unsafe { sys::cuCtxGetCurrent(&raw mut context) });
    context
}

/// Device memory in the current context.
#[derive(Debug)]
pub struct Buffer {
    pub address: u64,
    pub bytes: usize,
    unused: Range<usize>,
}

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        let mut address = 0;
        // SAFETY: the driver writes one address.
        check(unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) });
        Self { address, bytes, unused: 0..0 }
    }

    pub fn of<T: Copy>(data: &[T]) -> Self {
        let buffer = Self::new(size_of_val(data));
        buffer.write(data);
        buffer
    }

    pub fn write<T: Copy>(&self, data: &[T]) {
        let bytes = size_of_val(data);
        assert!(bytes <= self.bytes);
        // SAFETY: both are that long.
        check(unsafe { sys::cuMemcpyHtoD_v2(self.address, data.as_ptr().cast(), bytes) });
    }

    /// Marks bytes that nobody may write.
    pub fn expect_unused(&mut self, range: Range<usize>) {
        self.unused = range;
        self.write(&vec![0xA5u8; self.bytes]);
    }

    pub fn check_unused(&self) {
        let bytes = self.read::<u8>();
        assert!(bytes[self.unused.clone()].iter().all(|byte| *byte == 0xA5));
    }

    /// Waits for the device and answers what is in the buffer.
    pub fn read<T: Copy + Default>(&self) -> Vec<T> {
        let mut data = vec![T::default(); self.bytes / size_of::<T>()];
        // SAFETY: the vector is that long; plain numbers.
        unsafe {
            check(sys::cuCtxSynchronize());
            check(sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), self.address, self.bytes));
        }
        data
    }

    pub fn pointer(&self) -> *mut c_void {
        ptr::without_provenance_mut(self.address as usize)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: our own memory.
        unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// A stream that does not wait for the default stream.
#[derive(Debug)]
pub struct Stream(pub sys::CUstream);

impl Stream {
    pub fn new() -> Self {
        let mut stream = ptr::null_mut();
        // SAFETY: the driver writes one handle; 1 is CU_STREAM_NON_BLOCKING.
        check(unsafe { sys::cuStreamCreate(&raw mut stream, 1) });
        Self(stream)
    }

    pub fn pointer(&self) -> *mut c_void {
        self.0.cast()
    }

    pub fn wait(&self) {
        // SAFETY: our own stream.
        check(unsafe { sys::cuStreamSynchronize(self.0) });
    }

    /// What `body` queues, as a graph.
    pub fn capture(&self, body: impl FnOnce()) -> Graph {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: our own stream; the driver writes handles.
        unsafe {
            check(sys::cuStreamBeginCapture_v2(self.0, mode));
            body();
            check(sys::cuStreamEndCapture(self.0, &raw mut graph));
            check(sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0));
        }
        Graph(executable)
    }

    pub fn launch(&self, graph: &Graph) {
        // SAFETY: handles of our own.
        check(unsafe { sys::cuGraphLaunch(graph.0, self.0) });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: our own stream.
        unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// A graph that can be launched.
#[derive(Debug)]
pub struct Graph(sys::CUgraphExec);

/// Calls that a driver refuses.
pub fn misuse() {
    let context = Context::new();
    let (stream, kept) = (Stream::new(), Buffer::of(&[1u8; 64]));
    let freed = Buffer::new(64).address;
    let (mut address, mut words) = (0, [0u8; 64]);
    // SAFETY: the mock driver checks every handle and address before it uses it.
    let refused = unsafe {
        [
            sys::cuMemFree_v2(freed),
            sys::cuMemcpyHtoD_v2(freed, words.as_ptr().cast(), 64),
            sys::cuMemcpyDtoH_v2(words.as_mut_ptr().cast(), kept.address + 4096, 64),
            sys::cuStreamSynchronize(ptr::without_provenance_mut(16)),
            sys::cuLaunchKernel(
                ptr::without_provenance_mut(16),
                1,
                1,
                1,
                32,
                1,
                1,
                0,
                stream.0,
                ptr::null_mut(),
                ptr::null_mut(),
            ),
        ]
    };
    assert!(refused.iter().all(|result| *result != CUresult::CUDA_SUCCESS), "{refused:?}");
    _ = stream.capture(|| {
        // SAFETY: as above.
        let refused = unsafe {
            [sys::cuMemAlloc_v2(&raw mut address, 64), sys::cuStreamSynchronize(stream.0)]
        };
        assert!(refused.iter().all(|result| *result != CUresult::CUDA_SUCCESS), "{refused:?}");
    });
    drop((kept, stream));
    drop(context);
    // SAFETY: as above.
    let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, 64) };
    assert_ne!(result, CUresult::CUDA_SUCCESS, "no context is current");
}
