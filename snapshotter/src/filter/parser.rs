//! Reads one filter. The text is walked once, from left to right, without recursion.

use regex::RegexBuilder;

use super::{Field, Filter, FilterError, Selector, Test};

/// What a compiled regular expression may take, in bytes. A few kilobytes are usual.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// How much of a bad filter an error repeats, in characters.
const ERROR_FILTER_CHARS_MAX: usize = 256;

/// Reads a filter. An empty one has no selectors.
pub(super) fn parse(filter: &str) -> Result<Filter, FilterError> {
    let mut selectors = Vec::new();
    if filter.is_empty() {
        return Ok(Filter(selectors));
    }
    let mut parser = Parser { text: filter, position: 0 };
    loop {
        selectors.push(parser.selector()?);
        match parser.peek() {
            None => return Ok(Filter(selectors)),
            Some(',') => parser.next(),
            Some(other) => return Err(parser.error(format!("a comma is missing before {other:?}"))),
        };
    }
}

/// An error at a byte of a filter.
pub(super) fn error(filter: &str, position: usize, problem: String) -> FilterError {
    let filter = filter.chars().take(ERROR_FILTER_CHARS_MAX).collect();
    FilterError { filter, position, problem }
}

struct Parser<'a> {
    text: &'a str,
    /// In bytes, always at a character's beginning.
    position: usize,
}

enum Operator {
    Equal,
    NotEqual,
    Matches,
}

impl<'a> Parser<'a> {
    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        let field = Field::from_path(&path);
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present });
        }
        let test = match self.operator()? {
            Operator::Equal => Test::Equal(self.value()?),
            Operator::NotEqual => Test::NotEqual(self.value()?),
            Operator::Matches => self.regex()?,
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_spaces();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let field = self.take_while(|c| c == '_' || c.is_ascii_alphanumeric());
        if field.is_empty() {
            return Err(self.error("a field name or a quoted one is missing".to_owned()));
        }
        Ok(field.to_owned())
    }

    fn operator(&mut self) -> Result<Operator, FilterError> {
        self.skip_spaces();
        let start = self.position;
        match self.take_while(is_operator) {
            "==" => Ok(Operator::Equal),
            "!=" => Ok(Operator::NotEqual),
            "~=" => Ok(Operator::Matches),
            found => {
                Err(error(self.text, start, format!("expected ==, != or ~=, found {found:?}")))
            }
        }
    }

    fn value(&mut self) -> Result<String, FilterError> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') => Err(self.error("only a regular expression may be quoted so".into())),
            _ => self.bare_value(),
        }
    }

    fn regex(&mut self) -> Result<Test, FilterError> {
        self.skip_spaces();
        let start = self.position;
        let pattern = match self.peek() {
            Some('"' | '/' | '|') => self.quoted()?,
            _ => self.bare_value()?,
        };
        RegexBuilder::new(&pattern)
            .size_limit(REGEX_BYTES_MAX)
            .build()
            .map(Test::Matches)
            .map_err(|bad| error(self.text, start, format!("bad regular expression: {bad}")))
    }

    fn bare_value(&mut self) -> Result<String, FilterError> {
        let separator = |c| c == '.' || is_operator(c);
        if self.peek().is_some_and(separator) {
            return Err(self.error("a value that begins like this must be quoted".to_owned()));
        }
        let value = self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
        if value.is_empty() {
            return Err(self.error("a value is missing; an empty one is \"\"".to_owned()));
        }
        Ok(value.to_owned())
    }

    /// A string in the quotes that it begins with, as Go writes it.
    fn quoted(&mut self) -> Result<String, FilterError> {
        let start = self.position;
        let quote = self.next();
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => {
                    return Err(error(self.text, start, "the quote is not closed".to_owned()));
                }
                closing if closing == quote => break,
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(plain) => push(&mut bytes, plain),
            }
        }
        let problem = |_| error(self.text, start, "the quoted value is not UTF-8".to_owned());
        String::from_utf8(bytes).map_err(problem)
    }

    /// What follows a backslash.
    fn escape(&mut self, quote: Option<char>, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let start = self.position;
        let escaped = self.next();
        match escaped {
            Some('a') => bytes.push(0x07),
            Some('b') => bytes.push(0x08),
            Some('f') => bytes.push(0x0c),
            Some('n') => bytes.push(b'\n'),
            Some('r') => bytes.push(b'\r'),
            Some('t') => bytes.push(b'\t'),
            Some('v') => bytes.push(0x0b),
            Some('\\') => bytes.push(b'\\'),
            Some('x') => bytes.push(self.byte(16, 2)?),
            Some('u') => push(bytes, self.character(4)?),
            Some('U') => push(bytes, self.character(8)?),
            Some('0'..='7') => {
                self.position = start;
                bytes.push(self.byte(8, 3)?);
            }
            Some(own) if escaped == quote => push(bytes, own),
            _ => return Err(error(self.text, start, "unknown escape sequence".to_owned())),
        }
        Ok(())
    }

    fn byte(&mut self, radix: u32, digits: usize) -> Result<u8, FilterError> {
        let start = self.position;
        let value = self.number(radix, digits)?;
        u8::try_from(value)
            .map_err(|_| error(self.text, start, "the escape is above a byte's 255".to_owned()))
    }

    fn character(&mut self, digits: usize) -> Result<char, FilterError> {
        let start = self.position;
        let value = self.number(16, digits)?;
        char::from_u32(value)
            .ok_or_else(|| error(self.text, start, "the escape is no Unicode character".to_owned()))
    }

    /// Exactly so many digits; eight hexadecimal ones fill the 32 bits.
    fn number(&mut self, radix: u32, digits: usize) -> Result<u32, FilterError> {
        let mut value = 0_u32;
        for _ in 0..digits {
            let digit = self.peek().and_then(|c| c.to_digit(radix));
            let digit = digit.ok_or_else(|| self.error(format!("{digits} digits are missing")))?;
            self.next();
            value = value.wrapping_mul(radix).wrapping_add(digit);
        }
        Ok(value)
    }

    fn skip_spaces(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let (taken, _) = rest.split_at(rest.find(|c| !wanted(c)).unwrap_or(rest.len()));
        self.position += taken.len();
        taken
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.position..).unwrap_or_default()
    }

    fn error(&self, problem: String) -> FilterError {
        error(self.text, self.position, problem)
    }
}

fn is_operator(c: char) -> bool {
    matches!(c, '=' | '!' | '~')
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}
