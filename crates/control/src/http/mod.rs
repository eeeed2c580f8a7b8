//! The control API over HTTP, on a unix socket that the edge and root may use.
//!
//! A request is read whole (its credential's assertion is bound to every byte of it), matched
//! against the [`operations`] table, answered by one function, and recorded.
//!
//! Must never see a client's secret: the edge takes it off and sends mint's assertion instead.

pub mod archive;
pub mod assertion;
pub mod fields;
pub mod lifecycle;
pub mod network;
pub mod openapi;
pub mod operations;
pub mod power;
pub mod resources;
pub mod runtime_access;
mod serve;
pub mod snapshot;
pub mod view;
pub mod workspace;

pub use serve::{Server, serve};

use crate::app::App;
use crate::op::Op;
use fields::Fields;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// One call, unwrapped.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// The path's parameters, by their names in the route.
    pub params: HashMap<&'static str, String>,
    /// The query.
    pub query: HashMap<String, String>,
    /// The body.
    pub body: Fields,
}

impl Call {
    /// The path's workspace.
    #[must_use]
    pub fn ws(&self) -> &str {
        self.params.get("ws").map_or("", String::as_str)
    }

    /// A whole number of the query in `range`, or `default`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn query_number(
        &self,
        name: &str,
        default: usize,
        range: std::ops::RangeInclusive<usize>,
    ) -> api::Result<usize> {
        let Some(text) = self.query.get(name).filter(|t| !t.is_empty()) else {
            return Ok(default);
        };
        text.parse()
            .ok()
            .filter(|n| range.contains(n))
            .ok_or_else(|| {
                let why = format!(
                    "must be a whole number from {} to {}",
                    range.start(),
                    range.end()
                );
                fields::invalid(name, &why)
            })
    }
}

/// An answer: a status and the fields beside `success`.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body's fields.
    pub body: Map<String, Value>,
}

impl Answer {
    /// 200 with the fields of a JSON object.
    #[must_use]
    pub fn ok(body: Value) -> Self {
        let body = match body {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        Self { status: 200, body }
    }
}

/// What a function of the table gives.
pub type Answered = Pin<Box<dyn Future<Output = api::Result<Answer>> + Send>>;

/// A function of the table.
pub type Handler = fn(Arc<App>, Arc<Op>, Arc<Call>) -> Answered;
