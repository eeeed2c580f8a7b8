//! JSON where a key stands once: the ground under everything signed.
//!
//! Two readers of `{"aud":"a","aud":"b"}` may take different values, so such a text has no
//! meaning and is refused at every depth. Trailing bytes are refused too.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Parses one JSON value with no duplicate keys (depth is bounded by `serde_json`'s 128).
///
/// The error says nothing of the input: it could be a secret.
pub(crate) fn parse_strict(text: &[u8]) -> Result<Value, &'static str> {
    match serde_json::from_slice::<Strict>(text) {
        Ok(Strict(value)) => Ok(value),
        Err(_) => Err("must be one JSON value without duplicate keys"),
    }
}

/// Parses a `T`, after [`parse_strict`] has accepted the text.
pub(crate) fn parse_as<T: DeserializeOwned>(text: &[u8]) -> Result<T, &'static str> {
    parse_strict(text)?;
    serde_json::from_slice(text).map_err(|_| "has not the fields it must have")
}

/// Serialises; fails only for types JSON can't hold (a map whose keys are no strings).
pub(crate) fn to_vec(value: &impl Serialize) -> Result<Vec<u8>, &'static str> {
    serde_json::to_vec(value).map_err(|_| "can't be written as JSON")
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate keys")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(Strict(value)) = seq.next_element()? {
            out.push(value);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom("duplicate key"));
            }
            let Strict(value) = map.next_value()?;
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn duplicates_and_trailing_bytes_are_refused() {
        for bad in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"x":[{"b":{"c":1,"c":2}}]}"#,
            "{} {}",
            "{}x",
            "",
            "{\"a\":1,}",
            "\u{feff}{}",
        ] {
            assert!(parse_strict(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse_strict("[".repeat(100_000).as_bytes()).is_err());
        assert!(parse_strict(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn all_kinds_of_values_pass() {
        let text = br#" {"n":null,"t":true,"i":-1,"u":18446744073709551615,"f":1.5,"s":"x","a":[1,[]],"o":{}} "#;
        assert_eq!(
            parse_strict(text).unwrap(),
            serde_json::from_slice::<Value>(text).unwrap()
        );
    }

    proptest! {
        #[test]
        fn never_accepts_what_serde_json_refuses(text in "[\\[\\]{}\",:0-9a-c\\\\ .-]{0,40}") {
            let strict = parse_strict(text.as_bytes());
            match serde_json::from_str::<Value>(&text) {
                Ok(lenient) => if let Ok(value) = strict { prop_assert_eq!(value, lenient) },
                Err(_) => prop_assert!(strict.is_err()),
            }
        }
    }
}
