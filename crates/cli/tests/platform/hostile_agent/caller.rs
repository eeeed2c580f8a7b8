//! A client of the gateway that sees every byte of an answer, and says whether it is what was wanted.
//! Must never read past a fault: a client with a library of its own would mend what it gets.

use crate::hostile::client;
use crate::hostile_guest::Guest;
use crate::world::{Account, Platform};
use seal::tls::rustls::ClientConfig;
use seal::tls::tokio_rustls::TlsConnector;
use seal::tls::{HTTP1, client_config_ca};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Within this an answer has ended.
pub(super) const WITHIN: Duration = Duration::from_secs(20);
/// In all that no caller asked for.
const UNASKED: &str = "unasked-for";

/// What the caller of a row gets.
#[derive(Debug, Clone)]
pub(super) enum Want {
    /// The edge's error.
    Refused,
    /// A head, and a body that is seen to be cut.
    Cut,
    /// Exactly this status and body.
    Whole(u16, &'static str),
    /// A body of this many bytes.
    Long(std::ops::Range<usize>),
    /// What goes on until the caller leaves, after so many bytes of a body.
    Endless(usize),
}

/// What only the platform may say to a browser.
const FORBIDDEN: &[&str] = &[
    "set-cookie",
    "access-control-",
    "cross-origin-",
    "clear-site-data",
    "nel",
    "report-to",
    "www-authenticate",
    "alt-svc",
    "server",
    "via",
    "casemate-",
    "keep-alive",
    "upgrade",
    "trailer",
    "x-hop",
];

/// What each answer has once, whoever wrote the rest.
const OURS: &[&str] = &[
    "strict-transport-security: max-age=",
    "x-request-id: req_",
    "cache-control: no-store",
];

/// A client of one workspace, at the gateway; each call by a connection of its own.
pub(super) struct Caller {
    tls: Arc<ClientConfig>,
    port: u16,
    token: String,
}

/// What it got, to the letter.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Lines of the head, names in lower case.
    head: Vec<String>,
    pub(super) body: Vec<u8>,
    pub(super) end: End,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Whole,
    Cut,
    Left,
}

impl Caller {
    pub(super) fn new(
        p: &Platform,
        runtime: &tokio::runtime::Runtime,
        account: &Account,
        guest: &Guest<'_>,
    ) -> Self {
        let client = client(p, account);
        let token = runtime.block_on(client.runtime_token(&guest.id)).unwrap();
        let ca = std::fs::read_to_string(p.ca()).unwrap();
        Self {
            tls: client_config_ca(&ca, HTTP1).unwrap(),
            port: p.port,
            token,
        }
    }

    /// Leaves after so many bytes of a body.
    pub(super) async fn get(&self, path: &str, leave: usize) -> Answer {
        let got = tokio::time::timeout(WITHIN, self.read(path, leave)).await;
        got.unwrap_or_else(|_| panic!("{path}: no end within {WITHIN:?}"))
    }

    async fn read(&self, path: &str, leave: usize) -> Answer {
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let name = "127.0.0.1".try_into().unwrap();
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let mut tls = connector.connect(name, tcp).await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\nauthorization: Bearer {}\r\n\
             connection: close\r\n\r\n",
            self.port, self.token
        );
        tls.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        loop {
            // What is missing shows in what is there, however the connection ended.
            let ended = matches!(tls.read_buf(&mut bytes).await, Ok(0) | Err(_));
            let head = bytes.windows(4).position(|w| w == b"\r\n\r\n");
            let left = head.is_some_and(|at| bytes.len() - at >= leave);
            if ended || left {
                return Answer::of(&bytes, left);
            }
        }
    }
}

impl Answer {
    fn of(bytes: &[u8], left: bool) -> Self {
        let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        let at = at.unwrap_or_else(|| panic!("no head: {}", String::from_utf8_lossy(bytes)));
        let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
        let mut head = head.split("\r\n");
        let status = head.next().unwrap();
        let status = status.strip_prefix("HTTP/1.1 ").unwrap()[..3]
            .parse()
            .unwrap();
        let lower = |l: &str| {
            let (name, value) = l.split_once(':').unwrap();
            format!("{}:{value}", name.to_ascii_lowercase())
        };
        let head: Vec<String> = head.map(lower).collect();
        let value = |name: &str| head.iter().find_map(|l| l.strip_prefix(name));
        let raw = &bytes[at + 4..];
        let (body, whole) = match (value("content-length: "), value("transfer-encoding: ")) {
            (Some(length), None) => (raw.to_vec(), length == raw.len().to_string()),
            (None, Some("chunked")) => chunks(raw),
            (None, None) => (raw.to_vec(), status == 204),
            both => panic!("{both:?}"),
        };
        let end = match (left, whole) {
            (true, _) => End::Left,
            (false, true) => End::Whole,
            (false, false) => End::Cut,
        };
        Self {
            status,
            head,
            body,
            end,
        }
    }

    /// Panics unless it is that.
    #[track_caller]
    pub(super) fn is(&self, what: &str, want: &Want) {
        if let Some(fault) = self.fault(want) {
            panic!("{what}: {fault}");
        }
    }

    /// What is wrong with it, if that was wanted.
    pub(super) fn fault(&self, want: &Want) -> Option<String> {
        let text = String::from_utf8_lossy(&self.body);
        let count = |name: &str| self.head.iter().filter(|l| l.starts_with(name)).count();
        let foreign = FORBIDDEN.iter().find(|name| count(name) > 0);
        let ours = OURS.iter().find(|name| count(name) != 1);
        let fault = if !self.is_like(want, &text) {
            format!("not {want:?}")
        } else if text.contains(UNASKED) {
            "what nobody asked for".into()
        } else if let Some(name) = foreign {
            format!("a guest's {name}")
        } else if let Some(name) = ours {
            format!("not one {name}")
        } else if self.head.iter().any(|l| l.ends_with(": hostile")) {
            "a guest's word in the platform's name".into()
        } else {
            return None;
        };
        let body: String = text.chars().take(300).collect();
        let (status, end, head) = (self.status, &self.end, &self.head);
        Some(format!("{fault}: {status} {end:?} {head:?} {body}"))
    }

    fn is_like(&self, want: &Want, text: &str) -> bool {
        let (status, whole) = (self.status, self.end == End::Whole);
        match want {
            Want::Refused => matches!(status, 502 | 504) && whole && is_error(&self.body),
            Want::Cut => status == 200 && self.end == End::Cut,
            Want::Whole(code, body) => status == *code && whole && text == *body,
            Want::Long(len) => status == 200 && whole && len.contains(&self.body.len()),
            Want::Endless(_) => status == 200 && self.end == End::Left,
        }
    }
}

/// An error as the contract has them.
fn is_error(body: &[u8]) -> bool {
    let said: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |key: &str| said[key].as_str().unwrap_or_default();
    let told = ["code", "message", "requestId"]
        .iter()
        .all(|k| !text(k).is_empty());
    said["success"] == false && text("error") == text("code") && told
}

/// The data of chunks, and whether they come to their end and nothing after it.
fn chunks(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut data = Vec::new();
    while let Some(at) = raw.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&raw[..at]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        raw = &raw[at + 2..];
        if size == 0 {
            return (data, raw == b"\r\n");
        }
        let there = size.min(raw.len());
        data.extend_from_slice(&raw[..there]);
        raw = raw.get(size + 2..).unwrap_or_default();
    }
    (data, false)
}
