//! Error answers, as the contract has them (§1.3): clients take a body without `success: false`
//! for a result.

use api::{Error, ErrorCode};
use http::{HeaderValue, Response, StatusCode, header};

use crate::body::{Payload, full};
use crate::hosts::NoPlane;

/// A refusal: an error, and the status where it is not its code's own.
#[derive(Debug)]
pub struct Refusal {
    /// What the client reads.
    pub error: Error,
    /// The status.
    pub status: StatusCode,
    /// After how long it is worth another try, seconds.
    pub retry_after_s: Option<u32>,
}

impl Refusal {
    /// With its code's status.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Error::new(code, message).into()
    }

    /// Whether the client's words could be taken in two ways, or were not for this server.
    #[must_use]
    pub fn is_malformed(&self) -> bool {
        matches!(
            self.error.code,
            ErrorCode::BadRequest | ErrorCode::Misdirected | ErrorCode::MethodNotAllowed
        )
    }

    /// The answer; what the operator must know goes to the log, never to the client.
    #[must_use]
    pub fn response(&self, request_id: &str) -> Response<Payload> {
        // What a guest does is its owner's affair, and none of this log's (EDGE-3).
        let not_ours = matches!(
            self.error.code,
            ErrorCode::NotSupported | ErrorCode::BadGateway | ErrorCode::Timeout
        );
        if self.status.is_server_error() && !not_ours {
            let detail = self.error.detail.as_deref().unwrap_or("");
            let code = self.error.code.as_str();
            tracing::warn!(request_id, code, detail, "not served");
        }
        let mut response = Response::new(full(self.json(request_id)));
        *response.status_mut() = self.status;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if let Some(s) = self.retry_after_s {
            let s = HeaderValue::from(s);
            response.headers_mut().insert(header::RETRY_AFTER, s);
        }
        response
    }

    /// The body.
    #[must_use]
    pub fn json(&self, request_id: &str) -> Vec<u8> {
        let code = self.error.code.as_str();
        serde_json::json!({
            "success": false,
            "error": code,
            "code": code,
            "message": self.error.message,
            "requestId": request_id,
        })
        .to_string()
        .into_bytes()
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = StatusCode::from_u16(error.code.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self {
            error,
            status,
            retry_after_s: None,
        }
    }
}

impl From<NoPlane> for Refusal {
    fn from(why: NoPlane) -> Self {
        match why {
            NoPlane::Malformed(why) => Self::new(ErrorCode::BadRequest, why),
            NoPlane::Misdirected => Self::new(
                ErrorCode::Misdirected,
                "this server does not answer for that host name; use one of edge.control_hosts or \
                 edge.gateway_hosts",
            ),
            NoPlane::Method => Self::new(ErrorCode::MethodNotAllowed, "this method is not served"),
        }
    }
}

/// A head that could not be read: the refusal for hyper's status.
#[must_use]
pub fn unreadable(status: u16) -> Refusal {
    let message = match status {
        431 => "the request's head is larger than 32 KiB or has more than 100 lines",
        414 => "the request's path is too long",
        _ => "this is no well-formed HTTP request",
    };
    Refusal {
        error: Error::new(ErrorCode::BadRequest, message),
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
        retry_after_s: None,
    }
}
