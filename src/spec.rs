//! The text in which pipelines, quantizers, stores and evictors are named.
//!
//! ```text
//! spec   := phase (';' phase)*
//! phase  := [ ('prefill'|'decode'|'all') ':' ] pipe
//! pipe   := stage ('|' stage)*
//! stage  := word [ '(' [arg (',' arg)*] ')' ]
//! arg    := [word '='] ( number | size | percent | string | pipe )
//! size   := number ('k'|'m'|'g'|'ki'|'mi'|'gi')        percent := number '%'
//! string := '"' any but '"' '"'        word := letter (letter | digit | '_' | '+' | '.')*
//! ```
//!
//! A word without parentheses, as an argument, is text. Errors name the column, counted from 1.

use crate::error::{Error, Kind, Result};

/// When a phase of a pipeline acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// When the prompt has been read.
    Prefill,
    /// While tokens are generated.
    Decode,
    /// Both.
    All,
}

/// One phase of a spec.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// The prefix of the phase, `None` when it was not written.
    pub when: Option<When>,
    /// The stages in written order, at least one.
    pub stages: Vec<Stage>,
}

/// A name with arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// The name.
    pub name: String,
    /// The arguments in written order.
    pub args: Vec<Arg>,
    /// Where the name starts, counted from 1.
    pub column: usize,
}

/// One argument of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Arg {
    /// The name before `=`, if any.
    pub name: Option<String>,
    /// The value.
    pub value: Value,
    /// Where the argument starts, counted from 1.
    pub column: usize,
}

/// The value of an argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number; sizes are multiplied out, percents divided by 100.
    Number(f64),
    /// A word or a quoted string.
    Text(String),
    /// A nested pipe: anything with parentheses or `|`.
    Pipe(Vec<Stage>),
}

/// Parses a whole spec.
pub fn parse(text: &str) -> Result<Vec<Phase>> {
    let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0 };
    let mut phases = vec![parser.phase()?];
    while parser.eat(b';') {
        phases.push(parser.phase()?);
    }
    parser.end()?;
    Ok(phases)
}

/// Parses exactly one stage, such as `host(capacity=64m)`.
pub fn parse_stage(text: &str) -> Result<Stage> {
    let mut parser = Parser { text: text.as_bytes(), at: 0, depth: 0 };
    let stage = parser.stage()?;
    parser.end()?;
    Ok(stage)
}

/// Deepest nesting of pipes: enough for any wrapper, small enough for any stack.
const MAX_DEPTH: usize = 16;

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn phase(&mut self) -> Result<Phase> {
        let start = self.at;
        let when = self.word().ok().and_then(|word| match word.as_str() {
            "prefill" => Some(When::Prefill),
            "decode" => Some(When::Decode),
            "all" => Some(When::All),
            _ => None,
        });
        let when = when.filter(|_| self.eat(b':'));
        if when.is_none() {
            self.at = start;
        }
        Ok(Phase { when, stages: self.pipe()? })
    }

    fn pipe(&mut self) -> Result<Vec<Stage>> {
        let mut stages = vec![self.stage()?];
        while self.eat(b'|') {
            stages.push(self.stage()?);
        }
        Ok(stages)
    }

    fn stage(&mut self) -> Result<Stage> {
        self.skip_space();
        let column = self.at + 1;
        let name = self.word()?;
        let mut args = Vec::new();
        if self.eat(b'(') {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err(self.error(&format!("nested deeper than {MAX_DEPTH}")));
            }
            if !self.eat(b')') {
                args.push(self.arg()?);
                while self.eat(b',') {
                    args.push(self.arg()?);
                }
                self.expect(b')')?;
            }
            self.depth -= 1;
        }
        Ok(Stage { name, args, column })
    }

    fn arg(&mut self) -> Result<Arg> {
        self.skip_space();
        let start = self.at;
        let column = start + 1;
        if let Ok(name) = self.word()
            && self.eat(b'=')
        {
            return Ok(Arg { name: Some(name), value: self.value()?, column });
        }
        self.at = start;
        Ok(Arg { name: None, value: self.value()?, column })
    }

    fn value(&mut self) -> Result<Value> {
        self.skip_space();
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'0'..=b'9' | b'-' | b'.') => self.number(),
            _ => {
                let mut pipe = self.pipe()?;
                if pipe.len() == 1 && pipe[0].args.is_empty() && self.text[self.at - 1] != b')' {
                    return Ok(Value::Text(pipe.remove(0).name));
                }
                Ok(Value::Pipe(pipe))
            }
        }
    }

    fn string(&mut self) -> Result<Value> {
        self.at += 1;
        let start = self.at;
        while self.peek().is_some_and(|byte| byte != b'"') {
            self.at += 1;
        }
        let text = String::from_utf8_lossy(&self.text[start..self.at]).into_owned();
        if self.peek().is_none() {
            return Err(self.error("the string has no closing quote"));
        }
        self.at += 1;
        Ok(Value::Text(text))
    }

    fn number(&mut self) -> Result<Value> {
        let start = self.at;
        let is_number = |parser: &Self| match parser.peek() {
            Some(b'0'..=b'9' | b'.') => true,
            Some(b'-') => parser.at == start || parser.text[parser.at - 1] == b'e',
            Some(b'e') => parser.at > start,
            _ => false,
        };
        while is_number(self) {
            self.at += 1;
        }
        let digits = String::from_utf8_lossy(&self.text[start..self.at]).into_owned();
        let number: f64 = digits.parse().map_err(|_| {
            Error::new(
                Kind::InvalidArgument,
                format!("column {}: {digits:?} is not a number", start + 1),
            )
        })?;
        Ok(Value::Number(number * self.unit()?))
    }

    fn unit(&mut self) -> Result<f64> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'%') {
            self.at += 1;
        }
        Ok(match &self.text[start..self.at] {
            b"" => 1.0,
            b"%" => 0.01,
            b"k" => 1e3,
            b"m" => 1e6,
            b"g" => 1e9,
            b"ki" => 1024.0,
            b"mi" => 1024.0 * 1024.0,
            b"gi" => 1024.0 * 1024.0 * 1024.0,
            other => {
                let unit = String::from_utf8_lossy(other).into_owned();
                self.at = start;
                return Err(
                    self.error(&format!("unknown unit {unit:?}; known: k, m, g, ki, mi, gi, %"))
                );
            }
        })
    }

    fn word(&mut self) -> Result<String> {
        self.skip_space();
        let start = self.at;
        if !self.peek().is_some_and(|byte| byte.is_ascii_alphabetic()) {
            return Err(self.error("expected a name"));
        }
        let inside = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'+' | b'.');
        while self.peek().is_some_and(inside) {
            self.at += 1;
        }
        Ok(String::from_utf8_lossy(&self.text[start..self.at]).into_owned())
    }

    fn end(&mut self) -> Result<()> {
        self.skip_space();
        if self.at == self.text.len() { Ok(()) } else { Err(self.error("expected '|' or the end")) }
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        if self.eat(byte) {
            return Ok(());
        }
        Err(self.error(&format!("expected {:?}", char::from(byte))))
    }

    fn eat(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn error(&self, text: &str) -> Error {
        let found = match self.text.get(self.at..) {
            None | Some([]) => "the end".to_string(),
            Some(rest) => {
                let rest = String::from_utf8_lossy(&rest[..rest.len().min(12)]);
                format!("{:?}", rest.chars().take(8).collect::<String>())
            }
        };
        let column = self.at + 1;
        Error::new(Kind::InvalidArgument, format!("column {column}: {text}, found {found}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_with_every_kind_of_argument() {
        let spec =
            "prefill: snapkv(64, kernel=5) | adakv(20%) ; decode: x(file=\"a b\", y(1)|z, 4ki)";
        let phases = parse(spec).unwrap();
        assert_eq!(phases.len(), 2);
        assert_eq!(phases[0].when, Some(When::Prefill));
        let snapkv = &phases[0].stages[0];
        assert_eq!((snapkv.name.as_str(), snapkv.column), ("snapkv", 10));
        assert_eq!(snapkv.args[1].name.as_deref(), Some("kernel"));
        assert_eq!(phases[0].stages[1].args[0].value, Value::Number(0.2));
        let x = &phases[1].stages[0];
        assert_eq!(x.args[0].value, Value::Text("a b".into()));
        assert!(matches!(&x.args[1].value, Value::Pipe(pipe) if pipe.len() == 2));
        assert_eq!(x.args[2].value, Value::Number(4096.0));
    }

    #[test]
    fn words_may_hold_plus_and_phases_may_be_absent() {
        let phases = parse("quant(k=had+q4_0, v=q4_0)").unwrap();
        assert_eq!(phases[0].when, None);
        assert_eq!(phases[0].stages[0].args[0].value, Value::Text("had+q4_0".into()));
    }

    #[test]
    fn errors_name_the_column() {
        let cases = [
            ("", "column 1"),
            ("snapkv(", "column 8"),
            ("snapkv(w=)", "column 10"),
            ("a | | b", "column 5"),
            ("a(1x)", "column 4"),
            ("a(\"b)", "column 6"),
            ("a b", "column 3"),
            ("prefill:", "column 9"),
            ("a;", "column 3"),
        ];
        for (text, column) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.message().starts_with(column), "{text:?}: {}", error.message());
        }
    }

    #[test]
    fn deep_nesting_and_random_bytes_are_errors_not_crashes() {
        assert!(parse(&"a(".repeat(10_000)).is_err());
        let mut state = 1u64;
        for _ in 0..20_000 {
            let text: Vec<u8> = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    b"ab|;:(),=\"%1.e-+ \xff"[(state >> 33) as usize % 18]
                })
                .collect();
            let _ = parse(&String::from_utf8_lossy(&text));
        }
    }
}
