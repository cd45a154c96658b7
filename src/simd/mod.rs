//! Inner loops, one table of functions for each instruction set, chosen once at run time.
//!
//! ```text
//! Kernels = { scalar, avx2, avx512 }    available() best first      active() = KVMGR_CPU or the best
//! ```
//!
//! A [`Kernels`] can only be had from [`available`], [`select`] or [`active`], all of which ask the
//! CPU first, so holding one proves that its instructions exist. Its methods check every length
//! before they enter a loop.
//!
//! The environment variable `KVMGR_CPU` (`scalar`, `avx2`, `avx512`) forces a level, to reproduce a
//! result or to measure. A value that this build or this CPU cannot honour does not stop the library:
//! [`active`] is then the best level, and [`forced_error`] says what was wrong, for the caller to
//! report.
//!
//! What must agree between levels: encoded bytes and decoded values, bit for bit, so that blocks
//! may move between machines. Sums ([`Kernels::dot`], [`Kernels::axpy`], [`Kernels::exp_sub`]) agree
//! up to rounding: of f32 for raw rows, and for rows of integers, whose queries and weights a level
//! may turn into integers too, of 2^-15 of the largest query or weight (2^-13 for `tq`).
//!
//! To add a level: one module with a static `Kernels`, and one word in `ALL`.

mod ahead;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod encode;
mod encode_affine;
mod prepared;
mod rows;
mod scalar;
mod scalar_levels;
pub mod sha256;
mod softmax;

use std::sync::OnceLock;

use crate::error::{Error, Result, bail};
pub use ahead::prefetch;
pub use prepared::IntegerQueries;
use rows::RowKernels;
pub use rows::{BLOCK, Format, Rows};

/// The name of the environment variable that forces a level.
pub const FORCE: &str = "KVMGR_CPU";

/// Every level of this build, best first.
static ALL: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &avx2::KERNELS,
    &scalar::KERNELS,
];

/// The inner loops for one instruction set.
#[derive(Debug)]
pub struct Kernels {
    /// The name of the level, as in `KVMGR_CPU`.
    pub name: &'static str,
    is_available: fn() -> bool,
    rows: [RowKernels; Format::COUNT],
    encode_f16: fn(&[f32], &mut [u8]),
    encode_bf16: fn(&[f32], &mut [u8]),
    encode_q8_0: fn(&[f32], &mut [u8]),
    encode_q4_0: fn(&[f32], &mut [u8]),
    encode_rows: fn(Format, &[f32], usize, &mut [u8]),
    all_within: fn(&[f32], f32) -> bool,
    channel_ranges: fn(&[f32], &mut [f32], &mut [f32]),
    group_ranges: fn(&[f32], usize, &mut [f32], &mut [f32]),
    encode_codes: EncodeCodes,
    dot_f32: fn(&[f32], &[f32]) -> f32,
    axpy_f32: fn(f32, &[f32], &mut [f32]),
    scale: fn(&mut [f32], f32),
    max: fn(&[f32]) -> f32,
    exp_sub: fn(&mut [f32], f32) -> f32,
    weigh: fn(&mut [f32], &mut Softmax<'_>),
    hadamard: fn(&mut [f32], usize),
}

/// The running softmax of some rows of logits.
#[derive(Debug)]
pub struct Softmax<'a> {
    /// For each row, its maximum; negative infinity where there is nothing yet.
    pub max: &'a mut [f32],
    /// For each row, the sum of its weights, `exp(logit - max)`.
    pub sum: &'a mut [f32],
    /// For each row, what weights made before must be multiplied with, because the maximum rose.
    pub factor: &'a mut [f32],
}

/// Bits, values, inverse, m, codes.
type EncodeCodes = fn(usize, &[f32], &[f32], &[f32], &mut [u8]);

/// The levels that this CPU can run, best first; never empty.
pub fn available() -> impl Iterator<Item = &'static Kernels> {
    ALL.iter().copied().filter(|kernels| (kernels.is_available)())
}

/// The level called `name`, or an error that says whether the build or the CPU lacks it.
pub fn select(name: &str) -> Result<&'static Kernels> {
    let usable: Vec<_> = available().map(|kernels| kernels.name).collect();
    match ALL.iter().find(|kernels| kernels.name == name) {
        Some(kernels) if (kernels.is_available)() => Ok(kernels),
        Some(_) => {
            bail!(Unsupported, "this CPU cannot run the {name:?} kernels; it can: {usable:?}")
        }
        None => bail!(Unsupported, "this build has no {name:?} kernels; usable here: {usable:?}"),
    }
}

/// The level that the library uses: what `KVMGR_CPU` names, otherwise the best one. Fixed at the
/// first call.
pub fn active() -> &'static Kernels {
    choice().0
}

/// Why `KVMGR_CPU` was not honoured; `None` when it was, or is not set.
pub fn forced_error() -> Option<&'static Error> {
    choice().1.as_ref()
}

fn choice() -> &'static (&'static Kernels, Option<Error>) {
    static CHOICE: OnceLock<(&Kernels, Option<Error>)> = OnceLock::new();
    CHOICE.get_or_init(|| choose(std::env::var_os(FORCE).map(|name| name.to_string_lossy().into())))
}

/// The level for a value of `KVMGR_CPU`; an empty value counts as absent.
fn choose(forced: Option<String>) -> (&'static Kernels, Option<Error>) {
    let best = available().next().unwrap_or(&scalar::KERNELS);
    match forced.filter(|name| !name.is_empty()).map(|name| select(&name)) {
        None => (best, None),
        Some(Ok(kernels)) => (kernels, None),
        Some(Err(error)) => (best, Some(error.within(FORCE))),
    }
}

/// Every method panics when lengths do not fit together: a bug in the caller.
impl Kernels {
    /// `scores[i, t] = queries[i] . row[t]`, overwriting. `queries` is `[n, dim]`, `scores` is
    /// `[n, rows.count]`. Each row is read and unpacked once for a batch of queries.
    pub fn dot(&self, format: Format, rows: &Rows<'_>, queries: &[f32], scores: &mut [f32]) {
        rows.check(format);
        rows.check_batch("queries", queries.len(), "scores", scores.len());
        (self.rows[format as usize].dot)(rows, queries, scores);
    }

    /// Whether there are loops for many queries and rows as they are, which are faster than those over
    /// decoded rows.
    pub fn takes_many(&self, format: Format, dim: usize) -> bool {
        let integers = &self.rows[format as usize].integers;
        integers.as_ref().is_some_and(|integers| dim <= integers.max_dim)
    }

    /// Makes what [`Self::dot_prepared`] can make use of from `queries`, `[n, dim]`.
    pub fn prepare(&self, format: Format, dim: usize, queries: &[f32], out: &mut IntegerQueries) {
        assert!(dim > 0 && queries.len().is_multiple_of(dim), "queries must be [n, {dim}]");
        out.clear();
        if let Some(integers) = &self.rows[format as usize].integers
            && dim.is_multiple_of(BLOCK)
            && dim <= integers.max_dim
            && (integers.prepare)(dim, queries, out)
        {
            out.set_shape(format, dim, queries.len() / dim);
        }
    }

    /// As [`Self::dot`], for queries of which this level may have made integers before; other integers
    /// are passed over.
    pub fn dot_prepared(
        &self,
        format: Format,
        rows: &Rows<'_>,
        (queries, prepared): (&[f32], &IntegerQueries),
        scores: &mut [f32],
    ) {
        rows.check(format);
        rows.check_batch("queries", queries.len(), "scores", scores.len());
        let kernels = &self.rows[format as usize];
        match &kernels.integers {
            Some(integers) if prepared.fits(format, rows, queries.len() / rows.dim) => {
                (integers.dot)(rows, prepared, scores);
            }
            _ => (kernels.dot)(rows, queries, scores),
        }
    }

    /// `outputs[i] += sum over t of weights[i, t] * row[t]`. `weights` is `[n, rows.count]`,
    /// `outputs` is `[n, dim]`.
    pub fn axpy(&self, format: Format, rows: &Rows<'_>, weights: &[f32], outputs: &mut [f32]) {
        rows.check(format);
        rows.check_batch("outputs", outputs.len(), "weights", weights.len());
        (self.rows[format as usize].axpy)(rows, weights, outputs);
    }

    /// Decodes the rows into `out`, `[rows.count, dim]`.
    pub fn decode(&self, format: Format, rows: &Rows<'_>, out: &mut [f32]) {
        rows.check(format);
        assert_eq!(out.len(), rows.count * rows.dim, "out must be [{}, {}]", rows.count, rows.dim);
        (self.rows[format as usize].decode)(rows, out);
    }

    /// Rounds to IEEE half precision, to nearest even; overflow becomes infinity.
    pub fn encode_f16(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), values.len() * 2, "out must hold {} f16", values.len());
        (self.encode_f16)(values, out);
    }

    /// Rounds to bfloat16, to nearest even.
    pub fn encode_bf16(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), values.len() * 2, "out must hold {} bf16", values.len());
        (self.encode_bf16)(values, out);
    }

    /// Encodes blocks of 32 values as ggml's `Q8_0`.
    pub fn encode_q8_0(&self, values: &[f32], out: &mut [u8]) {
        check_blocks(values.len(), out.len(), Format::Q8_0);
        (self.encode_q8_0)(values, out);
    }

    /// Encodes blocks of 32 values as ggml's `Q4_0`.
    pub fn encode_q4_0(&self, values: &[f32], out: &mut [u8]) {
        check_blocks(values.len(), out.len(), Format::Q4_0);
        (self.encode_q4_0)(values, out);
    }

    /// Encodes rows of `dim` values in a format that has no encoder of its own above.
    pub fn encode_rows(&self, format: Format, values: &[f32], dim: usize, out: &mut [u8]) {
        assert!((1..=MAX_ROW).contains(&dim), "dim is {dim}, must be in 1..={MAX_ROW}");
        assert_eq!(values.len() % dim, 0, "values must be [n, {dim}]");
        assert_eq!(dim % format.multiple(), 0, "{format:?} has no rows of {dim}");
        let bytes = values.len() / dim * format.row_bytes(dim, BLOCK);
        assert_eq!(out.len(), bytes, "out has the wrong length");
        (self.encode_rows)(format, values, dim, out);
    }

    /// Whether every magnitude is at most `limit`; false if a value is NaN.
    pub fn all_within(&self, values: &[f32], limit: f32) -> bool {
        (self.all_within)(values, limit)
    }

    /// Smallest and largest value of each channel of finite `values`, `[tokens, dim]`; `low` and
    /// `high` are `[dim]`.
    pub fn channel_ranges(&self, values: &[f32], low: &mut [f32], high: &mut [f32]) {
        assert_eq!(low.len(), high.len(), "low and high must be equally long");
        assert_eq!(values.len() % low.len(), 0, "values must be [tokens, {}]", low.len());
        (self.channel_ranges)(values, low, high);
    }

    /// Smallest and largest value of each run of `group` finite values; the last may be shorter.
    /// Lengths are multiples of 32.
    pub fn group_ranges(&self, row: &[f32], group: usize, low: &mut [f32], high: &mut [f32]) {
        assert!(group > 0 && group.is_multiple_of(BLOCK), "a group of {group} channels");
        assert_eq!(row.len() % BLOCK, 0, "a row of {} channels", row.len());
        let groups = row.len().div_ceil(group);
        assert!(low.len() == groups && high.len() == groups, "low and high must be [{groups}]");
        (self.group_ranges)(row, group, low, high);
    }

    /// Codes `(x - m) * inverse`, rounded half to even and limited to `bits` bits (2 or 4), of
    /// finite `values`, `[tokens, dim]`, as rows of `Codes2` or `Codes4`; `inverse` and `m` are
    /// `[dim]`.
    pub fn encode_codes(
        &self,
        bits: usize,
        values: &[f32],
        inverse: &[f32],
        m: &[f32],
        out: &mut [u8],
    ) {
        let dim = m.len();
        assert!(bits == 2 || bits == 4, "{bits} bits");
        assert!(dim > 0 && dim.is_multiple_of(BLOCK), "a row of {dim} channels");
        assert_eq!(inverse.len(), dim, "inverse and m must be equally long");
        assert_eq!(values.len() % dim, 0, "values must be [tokens, {dim}]");
        assert_eq!(out.len(), values.len() * bits / 8, "out has the wrong length");
        (self.encode_codes)(bits, values, inverse, m, out);
    }

    /// `a . b`.
    pub fn dot_f32(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "a and b must be equally long");
        (self.dot_f32)(a, b)
    }

    /// `y += factor * x`.
    pub fn axpy_f32(&self, factor: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len(), "x and y must be equally long");
        (self.axpy_f32)(factor, x, y);
    }

    /// `values *= factor`.
    pub fn scale(&self, values: &mut [f32], factor: f32) {
        (self.scale)(values, factor);
    }

    /// The largest value; NaN is passed over, and nothing at all gives negative infinity.
    pub fn max(&self, values: &[f32]) -> f32 {
        (self.max)(values)
    }

    /// `scores = exp(scores - max)` in place; returns their sum. `max` must be at least the largest
    /// score. Results below the smallest normal number are 0, negative infinity gives 0, NaN stays
    /// NaN. A `max` of negative infinity (all masked) gives zeros and the sum 0.
    pub fn exp_sub(&self, scores: &mut [f32], max: f32) -> f32 {
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return 0.0;
        }
        // Short runs, so that the error of a long f32 sum cannot build up.
        let runs = scores.chunks_mut(softmax::RUN);
        runs.map(|run| f64::from((self.exp_sub)(run, max))).sum::<f64>() as f32
    }

    /// Turns logits, `[rows, n]`, into weights under the maximum of their row so far, and adds them to
    /// its sum, all rows of a running softmax at once. A row of nothing but negative infinity changes
    /// nothing, one of nothing but NaN does: it makes the sum NaN.
    pub fn weigh(&self, scores: &mut [f32], softmax: &mut Softmax<'_>) {
        let rows = softmax.max.len();
        let fits = softmax.sum.len() == rows && softmax.factor.len() == rows;
        assert!(fits, "max, sum and factor must be equally long");
        assert!(rows > 0 && scores.len().is_multiple_of(rows), "scores must be [{rows}, n]");
        (self.weigh)(scores, softmax);
    }

    /// Multiplies each run of `size` values by the orthonormal Sylvester Hadamard matrix of that
    /// size, a power of two that divides the length. It is its own inverse.
    pub fn hadamard(&self, values: &mut [f32], size: usize) {
        assert!(size.is_power_of_two(), "size is {size}, must be a power of two");
        assert_eq!(values.len() % size, 0, "{} values are no multiple of {size}", values.len());
        (self.hadamard)(values, size);
    }
}

/// Most elements of a row that [`Kernels::encode_rows`] takes.
pub const MAX_ROW: usize = 4096;

fn check_blocks(values: usize, bytes: usize, format: Format) {
    assert_eq!(values % BLOCK, 0, "{values} values are no multiple of {BLOCK}");
    assert_eq!(bytes, format.row_bytes(values, BLOCK), "out has the wrong length");
}

/// Makes the values of a block fit to be scaled: NaN becomes 0, an infinity becomes the largest
/// finite magnitude of the block with its sign, and what exceeds `limit` saturates there.
pub fn sanitize(values: &mut [f32], limit: f32) {
    let finite = |x: f32| if x.is_finite() { x.abs() } else { 0.0 };
    let most = values.iter().map(|x| finite(*x)).fold(0.0, f32::max).min(limit);
    for x in values {
        *x = if x.is_nan() { 0.0 } else { x.clamp(-most, most) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_level_is_honoured_or_explained() {
        let (best, error) = choose(None);
        assert!(error.is_none());
        assert_eq!(best.name, available().next().unwrap().name);
        assert_eq!(choose(Some(String::new())).0.name, best.name);
        let (scalar, error) = choose(Some("scalar".into()));
        assert!(error.is_none() && scalar.name == "scalar");
        let (fallback, error) = choose(Some("sse9".into()));
        assert_eq!(fallback.name, best.name);
        let text = error.unwrap().message().to_string();
        assert!(text.contains("KVMGR_CPU") && text.contains("sse9") && text.contains("scalar"));
    }
}
