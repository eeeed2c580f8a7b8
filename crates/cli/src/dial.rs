//! Dials a TCP address and says in one word what happened: `open`, `refused`, `silence`, …
//! The checks run it inside the network namespace of the taps.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

/// What a dial met.
#[must_use]
pub fn dial(address: SocketAddr, from: Option<IpAddr>, wait_ms: u64) -> String {
    let wait = Duration::from_millis(wait_ms.clamp(1, 10_000));
    let result = match from {
        None => TcpStream::connect_timeout(&address, wait).map(drop),
        Some(from) => dial_from(address, from, wait),
    };
    match result {
        Ok(()) => "open".into(),
        Err(e) => match e.kind() {
            std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => "silence".into(),
            std::io::ErrorKind::ConnectionRefused => "refused".into(),
            // The firewall's answer to a packet of this machine's own.
            std::io::ErrorKind::PermissionDenied => "dropped".into(),
            _ => format!("{e}"),
        },
    }
}

/// Counts the datagrams that arrive at `port` of any local address until standard input ends.
/// Prints `ready` once it listens, and the number at its end.
///
/// # Errors
/// When the port is taken.
pub fn listen(port: u16) -> std::io::Result<()> {
    use std::io::Read as _;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, port))?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    socket.set_nonblocking(true)?;
    let mut count = 0u64;
    // What has come waits in the socket's buffer: a few hundred datagrams fit.
    while socket.recv(&mut [0; 16]).is_ok() {
        count += 1;
    }
    println!("{count}");
    Ok(())
}

fn dial_from(address: SocketAddr, from: IpAddr, wait: Duration) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let socket = match from {
            IpAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            IpAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        socket.bind(SocketAddr::new(from, 0))?;
        match tokio::time::timeout(wait, socket.connect(address)).await {
            Ok(r) => r.map(drop),
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
        }
    })
}
