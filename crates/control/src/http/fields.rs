//! Reading a JSON body field by field, so that an error names the field and its bound.
//!
//! Fields that nobody reads are ignored, as the contract wants; `null` is absence.

use crate::limits::TEXT_MAX_CHARS;
use api::{Error, ErrorCode};
use model::limits::TTL_S;
use serde_json::{Map, Value};

/// A JSON object, and its place in the body for messages.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    map: Map<String, Value>,
    prefix: String,
}

/// A field that is wrong.
#[must_use]
pub fn invalid(field: &str, why: &str) -> Error {
    Error::new(ErrorCode::ValidationError, format!("{field}: {why}"))
}

/// A field of the contract that this version does not do.
#[must_use]
pub fn not_supported(field: &str) -> Error {
    Error::new(
        ErrorCode::NotSupported,
        format!("{field}: this version does not support it"),
    )
}

impl Fields {
    /// Parses a body; an empty one is an empty object.
    ///
    /// # Errors
    /// [`ErrorCode::BadRequest`] if it is not a JSON object.
    pub fn parse(body: &[u8]) -> api::Result<Self> {
        let bad = |why: String| Error::new(ErrorCode::BadRequest, why);
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self::default());
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self {
                map,
                prefix: String::new(),
            }),
            Ok(_) => Err(bad("the body must be a JSON object".into())),
            Err(e) => Err(bad(format!(
                "the body is not JSON (line {}, column {})",
                e.line(),
                e.column()
            ))),
        }
    }

    /// Whether the field is there, `null` included.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// The field, unless absent or `null`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// An object inside; an absent one is empty.
    ///
    /// # Errors
    /// If it is something else.
    pub fn object(&self, name: &str) -> api::Result<Self> {
        let prefix = format!("{}{name}.", self.prefix);
        match self.get(name) {
            None => Ok(Self {
                map: Map::new(),
                prefix,
            }),
            Some(Value::Object(map)) => Ok(Self {
                map: map.clone(),
                prefix,
            }),
            Some(_) => Err(self.wrong(name, "must be an object")),
        }
    }

    /// A string of at most `max` characters without control characters.
    ///
    /// # Errors
    /// If it is something else.
    pub fn text_within(&self, name: &str, max: usize) -> api::Result<Option<String>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) if s.chars().count() > max => {
                Err(self.wrong(name, &format!("must be at most {max} characters")))
            }
            Some(Value::String(s)) if s.chars().any(char::is_control) => {
                Err(self.wrong(name, "must not hold control characters"))
            }
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(_) => Err(self.wrong(name, "must be a string")),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// If it is something else or too long.
    pub fn text(&self, name: &str) -> api::Result<Option<String>> {
        self.text_within(name, TEXT_MAX_CHARS)
    }

    /// A boolean.
    ///
    /// # Errors
    /// If it is something else.
    pub fn flag(&self, name: &str) -> api::Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.wrong(name, "must be true or false")),
        }
    }

    /// A whole number in `range`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<u32>,
    ) -> api::Result<Option<u32>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let n = value.as_u64().and_then(|n| u32::try_from(n).ok());
        n.filter(|n| range.contains(n)).map(Some).ok_or_else(|| {
            let (from, to) = (range.start(), range.end());
            self.wrong(name, &format!("must be a whole number from {from} to {to}"))
        })
    }

    /// The first of several names of the same number that is there.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number_of(
        &self,
        names: &[&str],
        range: &std::ops::RangeInclusive<u32>,
    ) -> api::Result<Option<u32>> {
        for name in names {
            if let Some(n) = self.number(name, range.clone())? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    /// A duration: seconds, or `30s`, `5m`, `1h`, `7d`. Answer: seconds.
    ///
    /// # Errors
    /// If it is something else, zero or beyond a year.
    pub fn duration(&self, name: &str) -> api::Result<Option<u64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let seconds = match value {
            Value::Number(n) => n.as_u64(),
            Value::String(s) => duration_parse(s),
            _ => None,
        };
        seconds
            .filter(|s| TTL_S.contains(s))
            .map(Some)
            .ok_or_else(|| {
                self.wrong(
                    name,
                    "must be seconds, or as \"30s\", \"5m\", \"1h\", \"7d\", up to 366 days",
                )
            })
    }

    /// A duration that may be 0, which is off, but else not below `least_s`. Answer: seconds.
    ///
    /// # Errors
    /// If it is something else.
    pub fn duration_or_off(&self, name: &str, least_s: u64) -> api::Result<Option<u64>> {
        match self.get(name) {
            Some(v) if v.as_u64() == Some(0) || v.as_str() == Some("0") => Ok(Some(0)),
            _ => match self.duration(name)? {
                Some(s) if s < least_s => {
                    let why = format!("must be 0, which is off, or at least {least_s} seconds");
                    Err(self.wrong(name, &why))
                }
                s => Ok(s),
            },
        }
    }

    /// A string that is one of the values of a closed type.
    ///
    /// # Errors
    /// If it is something else; the message names `values`.
    pub fn one_of<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        values: &str,
    ) -> api::Result<Option<T>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|_| self.wrong(name, &format!("must be one of {values}")))
    }

    /// An array.
    ///
    /// # Errors
    /// If it is something else or longer than `max`.
    pub fn array(&self, name: &str, max: usize) -> api::Result<Option<&[Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(a)) if a.len() <= max => Ok(Some(a)),
            Some(Value::Array(_)) => {
                Err(self.wrong(name, &format!("must have at most {max} entries")))
            }
            Some(_) => Err(self.wrong(name, "must be an array")),
        }
    }

    /// TCP ports, without repetitions, in order.
    ///
    /// # Errors
    /// If one is not from 1 to 65535, or there are too many.
    pub fn ports(&self, name: &str) -> api::Result<Option<Vec<u16>>> {
        let Some(values) = self.array(name, model::limits::INGRESS_PORTS_MAX)? else {
            return Ok(None);
        };
        let port = |v: &Value| {
            let n = v.as_u64().and_then(|n| u16::try_from(n).ok());
            n.filter(|n| *n > 0)
                .ok_or_else(|| self.wrong(name, "must hold ports from 1 to 65535"))
        };
        let mut ports = values.iter().map(port).collect::<api::Result<Vec<_>>>()?;
        ports.sort_unstable();
        ports.dedup();
        Ok(Some(ports))
    }

    /// Refuses each of these fields if it asks for something (neither `null`, `false`, `0`, nor
    /// empty).
    ///
    /// # Errors
    /// [`ErrorCode::NotSupported`], naming the field.
    pub fn refuse(&self, names: &[&str]) -> api::Result<()> {
        for name in names {
            let asks = match self.get(name) {
                None | Some(Value::Bool(false)) => false,
                Some(Value::String(s)) => !s.is_empty(),
                Some(Value::Array(a)) => !a.is_empty(),
                Some(Value::Object(o)) => !o.is_empty(),
                Some(Value::Number(n)) => n.as_u64() != Some(0),
                Some(_) => true,
            };
            if asks {
                return Err(not_supported(&format!("{}{name}", self.prefix)));
            }
        }
        Ok(())
    }

    /// An error about a field.
    #[must_use]
    pub fn wrong(&self, name: &str, why: &str) -> Error {
        invalid(&format!("{}{name}", self.prefix), why)
    }
}

fn duration_parse(text: &str) -> Option<u64> {
    let (digits, unit) = match text.char_indices().last()? {
        (at, 's') => (&text[..at], 1),
        (at, 'm') => (&text[..at], 60),
        (at, 'h') => (&text[..at], 3_600),
        (at, 'd') => (&text[..at], 86_400),
        _ => (text, 1),
    };
    let digits_only = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let n = digits_only.then(|| digits.parse::<u64>().ok())??;
    n.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations() {
        for (text, seconds) in [
            ("90", 90),
            ("5m", 300),
            ("1h", 3_600),
            ("7d", 604_800),
            ("30s", 30),
        ] {
            assert_eq!(duration_parse(text), Some(seconds));
        }
        for bad in [
            "",
            "m",
            "-5m",
            "5 m",
            "5x",
            "1.5h",
            "99999999999999999999d",
            "５m",
        ] {
            assert_eq!(duration_parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn errors_name_the_field_and_its_place() {
        let f = Fields::parse(br#"{"config":{"cpus":99,"ttl":0,"env":3},"ports":[0]}"#).unwrap();
        let c = f.object("config").unwrap();
        let e = c.number("cpus", 1..=32).unwrap_err();
        assert!(
            e.message.starts_with("config.cpus:") && e.message.contains("32"),
            "{e}"
        );
        assert!(
            c.duration("ttl")
                .unwrap_err()
                .message
                .starts_with("config.ttl:")
        );
        assert!(f.ports("ports").unwrap_err().message.starts_with("ports:"));
        assert!(
            c.array("env", 3)
                .unwrap_err()
                .message
                .starts_with("config.env:")
        );
    }

    #[test]
    fn only_an_object_is_a_body() {
        assert!(Fields::parse(b"").unwrap().get("a").is_none());
        assert!(Fields::parse(b" \n").is_ok());
        for bad in ["[]", "1", "{", "{\"a\":1}x", "\u{feff}{}"] {
            assert_eq!(
                Fields::parse(bad.as_bytes()).unwrap_err().code,
                ErrorCode::BadRequest
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".{0,60}", n in any::<i64>()) {
            let _ = duration_parse(&text);
            let _ = Fields::parse(text.as_bytes());
            let f = Fields::parse(serde_json::json!({"a": text, "n": n, "l": [n]}).to_string().as_bytes()).unwrap();
            let _ = (f.text("a"), f.number("n", 1..=5), f.duration("a"), f.duration("n"), f.ports("l"));
            prop_assert!(f.flag("a").is_err());
        }
    }
}
