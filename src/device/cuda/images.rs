//! The kernels that are part of this library: PTX made from `kernels/*.cu`, which the driver
//! compiles for its device when it is loaded, and cubins if the build was told to make some.
//!
//! A file holds many kernels, and compiling all of them would take seconds. Only the one that is
//! wanted is handed to the driver.

use std::borrow::Cow;
use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::ptx;
use crate::error::{Result, bail};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// A folder with `*.ptx` for those who work on kernels; its files come before the embedded ones.
const FOLDER: &str = "KVMGR_PTX_DIR";

/// Whether this build has kernels.
pub fn has_kernels() -> bool {
    !embedded::FILES.is_empty()
}

/// What the driver loads.
#[derive(Debug)]
pub(super) struct Image {
    /// A cubin, or PTX text that ends in NUL.
    pub(super) bytes: Cow<'static, [u8]>,
    /// Whether the kernel waits by itself for the results of the one before.
    pub(super) starts_early: bool,
}

/// An image with the kernel `name` for a device of compute capability `sm / 10`.`sm % 10`: a cubin for
/// this very device if the build made one, else PTX of this kernel and no other.
pub(super) fn find(name: &str, sm: u32) -> Result<Image> {
    let from_folder = std::env::var_os(FOLDER).map(PathBuf::from);
    let from_folder = from_folder.as_deref().map(read_folder).transpose()?.unwrap_or_default();
    let is_own = |text: &&String| from_folder.iter().any(|own| std::ptr::eq(own, *text));
    for text in from_folder.iter().chain(&embedded(name)) {
        let Some(ptx) = ptx::only(text, name) else { continue };
        let ptx = ptx::for_device(ptx, sm);
        let starts_early = ptx.contains("\tgriddepcontrol.wait");
        let bytes = match cubin(name, sm).filter(|_| !is_own(&text)) {
            Some(cubin) => Cow::Borrowed(cubin),
            None => Cow::Owned(CString::new(ptx).unwrap_or_default().into_bytes_with_nul()),
        };
        return Ok(Image { bytes, starts_early });
    }
    bail!(Unsupported, "this build has no CUDA kernel {name}")
}

/// A cubin for this architecture that has the kernel.
fn cubin(name: &str, sm: u32) -> Option<&'static [u8]> {
    let section = format!(".text.{name}\0");
    let has = |bytes: &[u8]| bytes.windows(section.len()).any(|part| part == section.as_bytes());
    embedded::CUBINS.iter().find(|(own, bytes)| *own == sm && has(bytes)).map(|(_, bytes)| *bytes)
}

/// The embedded file that has a kernel, unpacked.
fn embedded(name: &str) -> Option<String> {
    let (_, packed) = embedded::FILES.iter().find(|(names, _)| names.contains(&name))?;
    let mut text = String::new();
    // A file that does not unpack has no kernel in it, which is reported by name.
    _ = flate2::read::GzDecoder::new(*packed).read_to_string(&mut text);
    Some(text)
}

fn read_folder(folder: &Path) -> Result<Vec<String>> {
    let read = || -> std::io::Result<Vec<String>> {
        let mut texts = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "ptx") {
                texts.push(std::fs::read_to_string(path)?);
            }
        }
        Ok(texts)
    };
    match read() {
        Ok(texts) => Ok(texts),
        Err(error) => bail!(Unsupported, "{FOLDER} is {}: {error}", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_files_have_the_kernels_they_are_listed_with() {
        for (names, _) in embedded::FILES {
            let text = embedded(names[0]).unwrap();
            assert!(text.contains(".version 8.1") && text.contains(".target sm_80"));
            assert!(names.iter().all(|name| ptx::only(&text, name).is_some()));
            assert_eq!(names.len(), text.matches(ptx::ENTRY).count());
        }
        assert_eq!(embedded("kvm_none"), None);
    }
}
