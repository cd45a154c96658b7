//! PTX as text: one kernel of several alone, for a newer device. build.rs uses it too.

/// What the name of a kernel follows.
pub(super) const ENTRY: &str = ".visible .entry ";

/// The name that a text after `ENTRY` starts with.
pub(super) fn name_of(entry: &str) -> &str {
    entry.split('(').next().unwrap_or("").trim()
}

/// Instructions that older devices lack stand in comments.
pub(super) fn for_device(image: String, sm: u32) -> String {
    match sm >= 90 {
        true => image.replace("//sm_90 ", "").replace(".target sm_80", ".target sm_90"),
        false => image,
    }
}

/// `ptx` without the kernels that have another name; `None` if it has none of this name.
pub(super) fn only(ptx: &str, name: &str) -> Option<String> {
    if !ptx.contains(&format!("{ENTRY}{name}(")) {
        return None;
    }
    let mut out = String::new();
    let mut rest = ptx;
    while let Some(start) = rest.find(ENTRY) {
        out.push_str(&rest[..start]);
        let entry = &rest[start..];
        // A body ends at the first brace in the first column.
        let end = entry.find("\n}").map_or(entry.len(), |end| end + 2);
        if name_of(&entry[ENTRY.len()..]) == name {
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
}
