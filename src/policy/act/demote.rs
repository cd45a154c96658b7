//! Demotion: what the score ranks low is not evicted, but stays in a lower format.
//!
//! ```text
//! rows in the keep set       stay in the format of quant(...), or in the dtype of the cache
//! other rows                 stay in the quantizers `k` and `v`, once they fill a block
//! ```
//!
//! What `quant(..., skip_layers, first, residual)` names is not demoted. Whatever is demoted stays so: a later
//! run demotes more, and promotes nothing.

use super::{Act, Entry};
use crate::registry::{Domain, Param};
use crate::shape::Needs;

pub(super) static ENTRY: Entry = Entry {
    name: "demote",
    summary: "tokens stay in a lower format instead of being evicted",
    paper: "MiKV, arXiv 2402.18096; ZipCache, arXiv 2405.14256",
    params: &[
        Param { name: "k", help: "quantizer of keys", domain: Domain::Text { default: "kivi2" } },
        Param {
            name: "v",
            help: "quantizer of values; if absent that of keys",
            domain: Domain::Text { default: "" },
        },
    ],
    needs: Needs::NONE,
    examples: &[
        "snapkv(w=32) | keep(0.25) | demote(kivi2)",
        "every(16) | h2o(recent=32) | keep(0.25) | demote(k=q4_0, v=kivi2) | quant(q8_0)",
    ],
    create: |args| {
        let key = args.text("k");
        let value = if args.is_given("v") { args.text("v") } else { key };
        Ok(Box::new(Demote { key: key.into(), value: value.into() }))
    },
};

/// The quantizers, which the parser checks: it knows the columns.
#[derive(Debug)]
struct Demote {
    key: String,
    value: String,
}

impl Act for Demote {
    fn needs(&self) -> Needs {
        ENTRY.needs
    }

    fn demotes(&self) -> Option<[&str; 2]> {
        Some([&self.key, &self.value])
    }
}
