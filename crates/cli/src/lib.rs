//! `casemate`: the command of users and operators, and the offline verifier.
//!
//! Must never hold a secret on a command line, or print one that was not asked for.
#![forbid(unsafe_code)]

pub mod agent;
pub mod audit;
pub mod client;
pub mod demo;
pub mod dial;
pub mod doctor;
pub mod erasure;
pub mod image;
pub mod operate;
pub mod probe;
pub mod progress;
pub mod supervise;
pub mod verify;
pub mod ws;
pub mod ws_archive;

use service::config::Config;

/// Addresses of the control API and the gateway.
#[must_use]
pub fn urls(config: &Config) -> [String; 2] {
    let port = config
        .edge
        .listen
        .first()
        .map_or(443, std::net::SocketAddr::port);
    let url = |hosts: &[String]| {
        let host = hosts.first().map_or("localhost", String::as_str);
        format!("https://{host}:{port}")
    };
    [
        url(&config.edge.control_hosts),
        url(&config.edge.gateway_hosts),
    ]
}
