//! The fields of a `config.json`, read with errors that name file and field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// An object of a configuration file.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    file: Option<&'a Path>,
    /// Names of the objects around this one, each with a dot.
    prefix: String,
    object: Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Parses a file's text. Bare `Infinity`, `-Infinity` and `NaN`, which Python writes, are understood.
    ///
    /// # Errors
    /// If the text is not a JSON object.
    pub fn parse(text: &str, file: Option<&'a Path>) -> Result<Self> {
        let whole = |message: String| Error::Config {
            file: file.map(Path::to_path_buf),
            field: "{}".into(),
            message,
        };
        match serde_json::from_str(&quote_bare_numbers(text)) {
            Ok(Value::Object(object)) => Ok(Self { file, prefix: String::new(), object }),
            Ok(_) => Err(whole("is not a JSON object".into())),
            Err(error) => Err(whole(format!("is not JSON: {error}"))),
        }
    }

    /// An object that was found elsewhere than in JSON, such as the part of a GGUF file's keys below `prefix`.
    pub(crate) fn from_object(object: Map<String, Value>, file: Option<&'a Path>, prefix: String) -> Self {
        Self { file, prefix, object }
    }

    /// An error about one field.
    pub fn error(&self, field: &str, message: impl Into<String>) -> Error {
        let field = format!("{}{field}", self.prefix);
        Error::Config { file: self.file.map(Path::to_path_buf), field, message: message.into() }
    }

    /// The value of a field, unless absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is written at all, if only as null.
    pub fn contains(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "is missing"))
    }

    fn read<T>(&self, field: &str, expected: &str, f: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        self.get(field)
            .map(|value| {
                f(value).ok_or_else(|| self.error(field, format!("is {value}, expected {expected}")))
            })
            .transpose()
    }

    /// A count that must be there.
    ///
    /// # Errors
    /// If the field is missing or not a whole number from 0.
    pub fn usize(&self, field: &str) -> Result<usize> {
        let value = self.usize_opt(field)?;
        self.required(field, value)
    }

    /// A count, if it is there.
    ///
    /// # Errors
    /// If the field is not a whole number from 0.
    pub fn usize_opt(&self, field: &str) -> Result<Option<usize>> {
        // Sizes beyond 2^31 are nobody's model, and their products would overflow.
        let small = |n: &u64| *n < 1 << 31;
        self.read(field, "a whole number from 0 to 2^31", |v| Some(v.as_u64().filter(small)? as usize))
    }

    /// A number of layers that must be there.
    ///
    /// # Errors
    /// If the field is missing, or [more than any model has](Self::check_layers).
    pub fn layers(&self, field: &str) -> Result<usize> {
        let count = self.usize(field)?;
        self.check_layers(field, count)?;
        Ok(count)
    }

    /// Whether a field may describe so many layers.
    ///
    /// # Errors
    /// If they are more than any model has: a layer takes memory before its weights are looked for.
    pub fn check_layers(&self, field: &str, count: usize) -> Result<()> {
        const MOST: usize = 1 << 12;
        if count > MOST {
            return Err(self.error(field, format!("is {count}, expected at most {MOST} layers")));
        }
        Ok(())
    }

    /// A truth value, or the given one.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn bool_or(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self.read(field, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A number, or the given one.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn f64_or(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.read(field, "a number", number)?.unwrap_or(default))
    }

    /// A pair of numbers, or the given one.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn range_or(&self, field: &str, default: (f64, f64)) -> Result<(f64, f64)> {
        let pair = |value: &Value| match value.as_array()?.as_slice() {
            [low, high] => {
                Some((number(low)?, high.is_null().then_some(f64::INFINITY).or_else(|| number(high))?))
            }
            _ => None,
        };
        Ok(self.read(field, "two numbers", pair)?.unwrap_or(default))
    }

    /// A text, if it is there.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn str_opt(&self, field: &str) -> Result<Option<String>> {
        self.read(field, "a text", |v| v.as_str().map(str::to_owned))
    }

    /// One id or a list of ids; none if absent.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        let ids = |v: &Value| match v {
            Value::Array(values) => values.iter().map(id).collect(),
            other => Some(vec![id(other)?]),
        };
        Ok(self.read(field, "a token id or a list of them", ids)?.unwrap_or_default())
    }

    /// An object within this one; empty if absent.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn object(&self, field: &str) -> Result<Fields<'a>> {
        let object = self.read(field, "an object", |v| v.as_object().cloned())?.unwrap_or_default();
        Ok(Fields { file: self.file, prefix: format!("{}{field}.", self.prefix), object })
    }

    /// A count, or the given one.
    ///
    /// # Errors
    /// If the field is not a whole number from 0.
    pub fn usize_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.usize_opt(field)?.unwrap_or(default))
    }

    /// A count; none if absent or the word "auto".
    ///
    /// # Errors
    /// If the field is something else.
    pub fn usize_or_auto(&self, field: &str) -> Result<Option<usize>> {
        match self.get(field).and_then(Value::as_str) {
            Some("auto") => Ok(None),
            _ => self.usize_opt(field),
        }
    }

    /// A list of counts, if it is there.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn usizes_opt(&self, field: &str) -> Result<Option<Vec<usize>>> {
        let list = |v: &Value| v.as_array()?.iter().map(|v| Some(v.as_u64()? as usize)).collect();
        self.read(field, "a list of whole numbers", list)
    }

    /// A list of numbers, if it is there.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn f64s_opt(&self, field: &str) -> Result<Option<Vec<f64>>> {
        self.read(field, "a list of numbers", |v| v.as_array()?.iter().map(number).collect())
    }

    /// A list of texts, if it is there.
    ///
    /// # Errors
    /// If the field is something else.
    pub fn strs_opt(&self, field: &str) -> Result<Option<Vec<String>>> {
        let list = |v: &Value| v.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect();
        self.read(field, "a list of texts", list)
    }

    /// Whether the field holds something: not absent, null, 0, false, or an empty text, list or object.
    pub fn is_set(&self, field: &str) -> bool {
        match self.get(field) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(values)) => !values.is_empty(),
            Some(Value::Object(values)) => !values.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Number(n)) => n.as_f64() != Some(0.0),
            Some(_) => true,
        }
    }
}

/// A number in any spelling that is found in published files: `{"__float__": "Infinity"}` is that of transformers 5.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(text) => match text.as_str() {
            "Infinity" | "inf" => Some(f64::INFINITY),
            "-Infinity" | "-inf" => Some(f64::NEG_INFINITY),
            other => other.parse().ok().filter(|n: &f64| !n.is_nan()),
        },
        Value::Object(object) => number(object.get("__float__").filter(|v| v.is_string())?),
        _ => None,
    }
}

/// Puts the numbers that JSON does not have, outside of texts, in quotes.
fn quote_bare_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut in_text) = (text, false);
    while let Some(c) = rest.chars().next() {
        if in_text && c == '\\' {
            let pair = rest.chars().take(2).map(char::len_utf8).sum();
            out.push_str(&rest[..pair]);
            rest = &rest[pair..];
            continue;
        }
        let bare =
            ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| !in_text && rest.starts_with(word));
        if let Some(word) = bare {
            out.extend(["\"", word, "\""]);
            rest = &rest[word.len()..];
            continue;
        }
        in_text ^= c == '"';
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_in_every_spelling() {
        for spelling in ["Infinity", "1e400", "null", r#""Infinity""#, r#"{"__float__": "Infinity"}"#] {
            let text = format!(r#"{{"name": "Infinity \" NaN", "limit": [0.0, {spelling}]}}"#);
            if spelling == "1e400" {
                assert!(Fields::parse(&text, None).is_err());
                continue;
            }
            let fields = Fields::parse(&text, None).unwrap();
            assert_eq!(fields.range_or("limit", (1.0, 1.0)).unwrap(), (0.0, f64::INFINITY), "{spelling}");
            assert_eq!(fields.str_opt("name").unwrap().unwrap(), "Infinity \" NaN");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let fields =
            Fields::parse(r#"{"a": {"b": -1, "c": "x"}}"#, Some(Path::new("/m/config.json"))).unwrap();
        let a = fields.object("a").unwrap();
        let message = a.usize("b").unwrap_err().to_string();
        assert_eq!(message, "config /m/config.json: `a.b` is -1, expected a whole number from 0 to 2^31");
        assert_eq!(a.usize("d").unwrap_err().to_string(), "config /m/config.json: `a.d` is missing");
        assert!(a.bool_or("c", true).is_err());
        assert!(Fields::parse("[]", None).is_err());
        assert!(Fields::parse("{", None).is_err());
    }
}
