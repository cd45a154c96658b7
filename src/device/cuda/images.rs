//! The kernels that are part of this library: PTX made from `kernels/*.cu`, which the driver
//! compiles for its device when it is loaded, and cubins if the build was told to make some.
//!
//! A file holds many kernels, and compiling all of them would take seconds. Only the one that is
//! wanted is handed to the driver.

use std::borrow::Cow;
use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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
    for text in from_folder.iter().chain(embedded()) {
        let Some(ptx) = only(text, name) else { continue };
        let ptx = for_device(ptx, sm);
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

/// Instructions that older devices lack stand in comments; build.rs does the same for cubins.
fn for_device(image: String, sm: u32) -> String {
    match sm >= 90 {
        true => image.replace("//sm_90 ", "").replace(".target sm_80", ".target sm_90"),
        false => image,
    }
}

/// The embedded files, unpacked.
fn embedded() -> &'static [String] {
    static TEXTS: OnceLock<Vec<String>> = OnceLock::new();
    TEXTS.get_or_init(|| {
        let unpack = |packed: &&[u8]| {
            let mut text = String::new();
            // A file that does not unpack has no kernel in it, which is reported by name.
            _ = flate2::read::GzDecoder::new(*packed).read_to_string(&mut text);
            text
        };
        embedded::FILES.iter().map(unpack).collect()
    })
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

/// `ptx` without the kernels that have another name; `None` if it has none of this name.
fn only(ptx: &str, name: &str) -> Option<String> {
    if !ptx.contains(&format!(".visible .entry {name}(")) {
        return None;
    }
    let mut out = String::new();
    let mut rest = ptx;
    while let Some(start) = rest.find(".visible .entry ") {
        out.push_str(&rest[..start]);
        let entry = &rest[start..];
        // A body ends at the first brace in the first column.
        let end = entry.find("\n}").map_or(entry.len(), |end| end + 2);
        let found = entry[".visible .entry ".len()..].split('(').next().unwrap_or("").trim();
        if found == name {
            out.push_str(&entry[..end]);
        }
        rest = &entry[end..];
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = ".version 8.1\n.extern .shared .align 16 .b8 smem[];\n\
        .visible .entry kvm_a(\n\t.param .b8 p[8]\n)\n.maxntid 128\n{\n{ add; }\n\n}\n\
        // between\n.visible .entry kvm_ab(\n)\n{\n\tret;\n\n}\n\n";

    #[test]
    fn one_kernel_is_taken_out_with_what_all_share() {
        let a = only(PTX, "kvm_a").unwrap();
        assert!(a.contains(".version") && a.contains("smem") && a.contains("add;"), "{a}");
        assert!(a.contains("// between") && !a.contains("kvm_ab"), "{a}");
        let ab = only(PTX, "kvm_ab").unwrap();
        assert!(ab.contains("ret;") && !ab.contains("kvm_a("), "{ab}");
        assert_eq!(only(PTX, "kvm_b"), None);
    }

    #[test]
    fn newer_devices_get_their_instructions() {
        let ptx = || "//\n.target sm_80\n//sm_90 griddepcontrol.wait;\n".to_string();
        assert_eq!(for_device(ptx(), 89), ptx());
        assert_eq!(for_device(ptx(), 120), "//\n.target sm_90\ngriddepcontrol.wait;\n");
    }

    #[test]
    fn embedded_files_unpack_to_ptx() {
        for text in embedded() {
            assert!(text.contains(".version 8.1") && text.contains(".target sm_80"));
            assert!(text.contains(".visible .entry kvm_"));
        }
    }
}
