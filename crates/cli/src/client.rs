//! The HTTP client of the control API and the gateway.

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Longest answer that is read, bytes: a file as large as `cp` moves, and what JSON makes of it.
const ANSWER_MAX_BYTES: usize = 80 << 20;
/// Longest text of an error that is shown, characters.
const TEXT_MAX_CHARS: usize = 2_000;

/// What is wrong with an answer that is none, and what to do.
const NO_JSON: &str = "the answer is no JSON: if a workspace gave it, something in the place of its agent answers: stop and start it; else see that the URL is Casemate's";
const TOO_LONG: &str =
    "the answer is longer than 80 MiB: ask for less, or write it to a file and copy that in parts";
const BROKEN: &str = "the answer broke off: see if it was done, then try again";

/// Where the platform is and who is asking.
#[derive(Debug, Clone, clap::Args)]
pub struct Target {
    /// Control API, e.g. <https://localhost:7443>.
    #[arg(
        long,
        env = "CASEMATE_CONTROL_URL",
        global = true,
        hide_env_values = true
    )]
    pub control_url: Option<String>,
    /// Gateway to workspaces, e.g. <https://127.0.0.1:7443>.
    #[arg(
        long,
        env = "CASEMATE_GATEWAY_URL",
        global = true,
        hide_env_values = true
    )]
    pub gateway_url: Option<String>,
    /// Certificate of the local CA, PEM.
    #[arg(long, env = "CASEMATE_CA", global = true)]
    pub ca: Option<PathBuf>,
}

/// A failed call: the process's exit code follows from it.
#[derive(Debug)]
pub struct ApiError {
    /// HTTP status; 0 when there was no answer.
    pub status: u16,
    /// The machine's word.
    pub code: String,
    /// For people.
    pub message: String,
    /// Ties it to the operator's log.
    pub request_id: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}", self.message, self.code)?;
        if !self.request_id.is_empty() {
            write!(f, ", request {}", self.request_id)?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for ApiError {}

/// A client of one installation.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    control: String,
    gateway: String,
    id: String,
    secret: String,
}

impl Client {
    /// The installation that `target` and the environment name.
    ///
    /// # Errors
    /// Which variable is missing, and what sets it.
    pub fn from_env(target: &Target) -> anyhow::Result<Self> {
        let hint = "; `casemate quickstart --keep` prints all of them as shell exports";
        let env =
            |name: &str| std::env::var(name).with_context(|| format!("{name} is not set{hint}"));
        Self::new(
            target
                .control_url
                .clone()
                .context(format!("CASEMATE_CONTROL_URL is not set{hint}"))?,
            target
                .gateway_url
                .clone()
                .context(format!("CASEMATE_GATEWAY_URL is not set{hint}"))?,
            target.ca.clone(),
            env("CASEMATE_CLIENT_ID")?,
            env("CASEMATE_CLIENT_SECRET")?,
        )
    }

    /// A client with these addresses and this API key.
    ///
    /// # Errors
    /// When the CA's file can't be read.
    pub fn new(
        control: String,
        gateway: String,
        ca: Option<PathBuf>,
        id: String,
        secret: String,
    ) -> anyhow::Result<Self> {
        let mut builder = reqwest::Client::builder()
            .tls_version_min(reqwest::tls::Version::TLS_1_3)
            .connect_timeout(std::time::Duration::from_secs(5));
        // The provider is the process's; a second call finds it there.
        let _ = (*seal::tls::provider()).clone().install_default();
        if let Some(ca) = ca {
            let pem = std::fs::read(&ca).with_context(|| format!("read {}", ca.display()))?;
            builder = builder.tls_certs_only([reqwest::Certificate::from_pem(&pem)
                .with_context(|| format!("{} is no certificate", ca.display()))?]);
        }
        Ok(Self {
            http: builder.build().context("make the HTTP client")?,
            control: control.trim_end_matches('/').to_owned(),
            gateway: gateway.trim_end_matches('/').to_owned(),
            id,
            secret,
        })
    }

    /// The gateway's address.
    #[must_use]
    pub fn gateway_url(&self) -> &str {
        &self.gateway
    }

    /// The HTTP client, for calls that the helpers here don't make.
    #[must_use]
    pub fn http(&self) -> &reqwest::Client {
        &self.http
    }

    /// One call of the control API; the JSON body of a success.
    ///
    /// # Errors
    /// [`ApiError`] when it is refused.
    pub async fn control(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.control))
            .header("x-client-id", &self.id)
            .header("x-client-secret", &self.secret);
        if let Some(body) = body {
            request = request.json(body);
        }
        json(request.send().await.map_err(unreachable)?).await
    }

    /// `GET` of the control API.
    ///
    /// # Errors
    /// [`ApiError`] when it is refused.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.control(reqwest::Method::GET, path, None).await
    }

    /// `POST` of the control API.
    ///
    /// # Errors
    /// [`ApiError`] when it is refused.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.control(reqwest::Method::POST, path, Some(body)).await
    }

    /// A gateway token for a workspace, enabling its runtime API.
    ///
    /// # Errors
    /// [`ApiError`] when it is refused.
    pub async fn runtime_token(&self, workspace: &str) -> anyhow::Result<String> {
        let path = format!("/workspace/{workspace}/runtime-api-access/enable");
        let answer = self.post(&path, &serde_json::json!({})).await?;
        answer["token"]
            .as_str()
            .map(str::to_owned)
            .context("the answer holds no token")
    }

    /// A call of a workspace's runtime API, through the gateway; the response as it comes.
    ///
    /// # Errors
    /// [`ApiError`] when nobody answers.
    pub async fn runtime(
        &self,
        token: &str,
        method: reqwest::Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<reqwest::Response> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.gateway))
            .bearer_auth(token);
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await.map_err(unreachable)
    }
}

/// The JSON body of a success, or the error that it carries. A workspace may have written it.
///
/// # Errors
/// [`ApiError`] for every other answer.
pub async fn json(response: reqwest::Response) -> anyhow::Result<Value> {
    let status = response.status().as_u16();
    let good = (200..300).contains(&status);
    let body = whole(response).await.and_then(|body| match &body[..] {
        [] => Ok(Value::Null),
        body => serde_json::from_slice(body).map_err(|_| NO_JSON),
    });
    let body = match body {
        Ok(body) if good && body["success"] != Value::Bool(false) => return Ok(body),
        Ok(body) => body,
        Err(why) if good => json!({ "code": "bad_answer", "message": why }),
        // The status says what there is to be said.
        Err(_) => Value::Null,
    };
    let text = |name: &str| clean(body[name].as_str().unwrap_or_default());
    let code = Some(text("code"))
        .filter(|c| !c.is_empty())
        .unwrap_or_else(|| text("error"));
    let message = Some(text("message"))
        .filter(|m| !m.is_empty())
        .unwrap_or_else(|| format!("the answer was HTTP {status}"));
    bail!(ApiError {
        status,
        code,
        message,
        request_id: text("requestId")
    })
}

/// The body, if it is there to its end and not too long.
async fn whole(mut response: reqwest::Response) -> Result<Vec<u8>, &'static str> {
    let mut whole = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|_| BROKEN)? {
        if whole.len() + chunk.len() > ANSWER_MAX_BYTES {
            return Err(TOO_LONG);
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole)
}

/// What another wrote, fit for a terminal.
fn clean(text: &str) -> String {
    let fit = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(TEXT_MAX_CHARS).map(fit).collect()
}

fn unreachable(e: reqwest::Error) -> anyhow::Error {
    let message = if e.is_connect() {
        "nothing answers there: is the platform up (`casemate status`), is CASEMATE_CA right?"
    } else {
        "the connection broke"
    };
    anyhow::Error::new(ApiError {
        status: 0,
        code: "unreachable".into(),
        message: format!("{message} [{e:?}]"),
        request_id: String::new(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    async fn said(status: u16, body: impl Into<reqwest::Body>) -> Result<Value, (String, String)> {
        let answer = http::Response::builder().status(status).body(body.into());
        let read = json(answer.unwrap().into()).await;
        read.map_err(|e| {
            let e = e.downcast::<ApiError>().unwrap();
            assert_eq!(e.status, status);
            (e.code, e.message)
        })
    }

    fn error(code: &str, message: &str) -> Result<Value, (String, String)> {
        Err((code.into(), message.into()))
    }

    #[tokio::test]
    async fn an_answer_is_taken_or_an_error_whatever_it_says() {
        assert_eq!(said(204, "").await, Ok(Value::Null));
        assert_eq!(said(200, r#"{"a":1}"#).await, Ok(json!({ "a": 1 })));
        let deep = "[".repeat(100_000);
        for body in ["garbage", &deep] {
            let got = said(200, body.to_owned()).await;
            assert_eq!(got, error("bad_answer", NO_JSON));
            assert_eq!(
                said(503, body.to_owned()).await,
                error("", "the answer was HTTP 503")
            );
        }
        let refused = r#"{"success":false,"code":"x\u001b[2J","message":"\u0007no"}"#;
        let got = error("x\u{fffd}[2J", "\u{fffd}no");
        assert_eq!(said(200, refused).await, got);
        assert_eq!(said(500, refused).await, got);
    }

    #[tokio::test]
    async fn an_answer_without_end_is_given_up() {
        let endless =
            futures_util::stream::repeat_with(|| std::io::Result::Ok(vec![b' '; 1 << 20]));
        let got = said(200, reqwest::Body::wrap_stream(endless)).await;
        assert_eq!(got, error("bad_answer", TOO_LONG));
        let broken = futures_util::stream::iter([
            Ok(vec![b'{']),
            Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        ]);
        let got = said(200, reqwest::Body::wrap_stream(broken)).await;
        assert_eq!(got, error("bad_answer", BROKEN));
    }
}
