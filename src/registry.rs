//! Families of named things: quantizers, policy stages, evictors, stores.
//!
//! A family is a static list made by `registry!`: one file and one word for each member. A member
//! states its parameters once, as data; from it come parsing, bounds, errors with a column, the
//! listing through the C ABI and the tests that visit every member.

use crate::error::{Error, Kind, Result, bail, ensure};
use crate::shape::Needs;
use crate::spec::{Stage, Value};

/// One parameter of a member, in positional order.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// Name in a spec.
    pub name: &'static str,
    /// One line for the documentation.
    pub help: &'static str,
    /// Type, default and range.
    pub domain: Domain,
}

/// Type, default and inclusive range of a parameter.
#[derive(Debug, Clone, Copy)]
pub enum Domain {
    /// A whole number.
    Int {
        /// Value when absent.
        default: i64,
        /// Smallest accepted value.
        min: i64,
        /// Largest accepted value.
        max: i64,
    },
    /// A real number.
    Real {
        /// Value when absent.
        default: f64,
        /// Smallest accepted value.
        min: f64,
        /// Largest accepted value.
        max: f64,
    },
    /// One of a list of words; the first is the default.
    Choice(&'static [&'static str]),
    /// Free text.
    Text {
        /// Value when absent.
        default: &'static str,
    },
    /// The path of a file, relative to the working directory; none if absent.
    File,
}

/// What every member of every family states about itself.
pub trait Member {
    /// Name in a spec.
    fn name(&self) -> &'static str;
    /// Parameters in positional order.
    fn params(&self) -> &'static [Param];
}

/// How the registry describes a stage of a pipeline, which makes a `T`.
#[derive(Debug)]
pub struct StageEntry<T: ?Sized> {
    /// Name in specs.
    pub name: &'static str,
    /// One line for the documentation.
    pub summary: &'static str,
    /// Where it is from; empty for plumbing.
    pub paper: &'static str,
    /// Parameters in positional order.
    pub params: &'static [Param],
    /// What the engine may have to hand over, over all parameters.
    pub needs: Needs,
    /// Pipelines that tests and benches visit.
    pub examples: &'static [&'static str],
    /// Makes the stage.
    pub create: fn(&Args) -> Result<Box<T>>,
}

/// Checked arguments of a member: one value for each parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Args {
    values: Vec<Value>,
    params: Vec<&'static str>,
    given: Vec<bool>,
}

impl Args {
    /// The whole number `name`. Panics if the member has no such parameter: a bug in the member.
    pub fn int(&self, name: &str) -> i64 {
        self.real(name) as i64
    }

    /// The whole number `name` as a count.
    pub fn count(&self, name: &str) -> usize {
        self.int(name) as usize
    }

    /// The real number `name`.
    pub fn real(&self, name: &str) -> f64 {
        match self.value(name) {
            Value::Number(number) => *number,
            other => panic!("parameter {name} is {other:?}, not a number"),
        }
    }

    /// The word or text `name`.
    pub fn text(&self, name: &str) -> &str {
        match self.value(name) {
            Value::Text(text) => text,
            other => panic!("parameter {name} is {other:?}, not text"),
        }
    }

    /// Whether the spec gave `name`, rather than leaving it at its default.
    pub fn is_given(&self, name: &str) -> bool {
        self.index(name).is_some_and(|i| self.given[i])
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.params.iter().position(|param| *param == name)
    }

    fn value(&self, name: &str) -> &Value {
        match self.index(name) {
            Some(i) => &self.values[i],
            None => panic!("no parameter {name}; the member has {:?}", self.params),
        }
    }
}

/// The member called `stage.name`, or an error that lists the family.
pub fn find<'a, M: Member + ?Sized>(family: &str, all: &[&'a M], stage: &Stage) -> Result<&'a M> {
    if let Some(member) = all.iter().find(|member| member.name() == stage.name) {
        return Ok(member);
    }
    let known: Vec<_> = all.iter().map(|member| member.name()).collect();
    bail!(
        InvalidArgument,
        "column {}: unknown {family} {:?}; known: {}",
        stage.column,
        stage.name,
        known.join(", ")
    )
}

/// Matches the arguments of `stage` with `params`: positional first, then by name, each in range.
pub fn resolve(params: &'static [Param], stage: &Stage) -> Result<Args> {
    let mut values: Vec<Value> = params.iter().map(|param| param.domain.default()).collect();
    let mut given = vec![false; params.len()];
    let mut named_seen = false;
    for (position, arg) in stage.args.iter().enumerate() {
        let index = match &arg.name {
            Some(name) => {
                named_seen = true;
                params.iter().position(|param| param.name == *name).ok_or_else(|| {
                    let known: Vec<_> = params.iter().map(|param| param.name).collect();
                    at(
                        arg.column,
                        &format!("{} has no parameter {name:?}; known: {known:?}", stage.name),
                    )
                })?
            }
            None if named_seen => {
                return Err(at(arg.column, "a positional argument follows a named one"));
            }
            None => position,
        };
        if index >= params.len() {
            let text = format!("{} takes at most {} arguments", stage.name, params.len());
            return Err(at(arg.column, &text));
        }
        if given[index] {
            return Err(at(arg.column, &format!("{:?} is given twice", params[index].name)));
        }
        params[index].check(&arg.value, arg.column)?;
        values[index] = arg.value.clone();
        given[index] = true;
    }
    Ok(Args { values, params: params.iter().map(|param| param.name).collect(), given })
}

fn at(column: usize, text: &str) -> Error {
    Error::new(Kind::InvalidArgument, format!("column {column}: {text}"))
}

impl Domain {
    fn default(&self) -> Value {
        match *self {
            Self::Int { default, .. } => Value::Number(default as f64),
            Self::Real { default, .. } => Value::Number(default),
            Self::Choice(words) => Value::Text(words[0].into()),
            Self::Text { default } => Value::Text(default.into()),
            Self::File => Value::Text(String::new()),
        }
    }
}

impl Param {
    fn check(&self, value: &Value, column: usize) -> Result<()> {
        let name = self.name;
        match (self.domain, value) {
            (Domain::Int { min, max, .. }, Value::Number(number)) => {
                ensure!(
                    number.fract() == 0.0 && (min as f64..=max as f64).contains(number),
                    InvalidArgument,
                    "column {column}: {name} is {number}, must be a whole number in {min}..={max}"
                );
            }
            (Domain::Real { min, max, .. }, Value::Number(number)) => {
                ensure!(
                    (min..=max).contains(number),
                    InvalidArgument,
                    "column {column}: {name} is {number}, must be in {min}..={max}"
                );
            }
            (Domain::Choice(words), Value::Text(text)) => {
                ensure!(
                    words.contains(&text.as_str()),
                    InvalidArgument,
                    "column {column}: {name} is {text:?}, must be one of {words:?}"
                );
            }
            (Domain::Text { .. }, Value::Text(_)) => {}
            (Domain::File, Value::Text(path)) => {
                ensure!(
                    path.is_empty() || std::path::Path::new(path).is_file(),
                    InvalidArgument,
                    "column {column}: {name} is {path:?}, which is not a file"
                );
            }
            (Domain::Int { .. } | Domain::Real { .. }, _) => {
                bail!(InvalidArgument, "column {column}: {name} must be a number")
            }
            _ => bail!(InvalidArgument, "column {column}: {name} must be a word"),
        }
        Ok(())
    }
}

/// Declares the modules of a family and the static list of their `ENTRY` items, and makes the type
/// of those a [`Member`] through its fields `name` and `params`.
///
/// ```ignore
/// registry! {
///     /// Every evictor, in the order of the documentation.
///     pub static EVICTORS: Entry = { lru, }
/// }
/// ```
macro_rules! registry {
    ($(#[$doc:meta])* $vis:vis static $all:ident: $entry:ty = { $($module:ident),* $(,)? }) => {
        $(mod $module;)*
        $(#[$doc])*
        $vis static $all: &[&$entry] = &[$(&$module::ENTRY),*];

        impl $crate::registry::Member for $entry {
            fn name(&self) -> &'static str {
                self.name
            }

            fn params(&self) -> &'static [$crate::registry::Param] {
                self.params
            }
        }
    };
}

pub(crate) use registry;
