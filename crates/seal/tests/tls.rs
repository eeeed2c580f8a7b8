//! TLS handshakes in memory: who gets through, and who does not.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use seal::tls::rustls::{
    ClientConfig, ClientConnection, Error, HandshakeKind, ProtocolVersion, RootCertStore,
    ServerConfig, ServerConnection, version,
};
use seal::tls::rustls_pki_types::ServerName;
use seal::tls::{
    HTTP1, HTTP2_AND_1, Identity, client_config, client_config_ca, local_ca, provider,
    server_config, server_config_pem,
};

const NAME: &str = "ws-0123456789abcdef.guest.casemate";
const HOUR: Duration = Duration::from_secs(3600);

/// Runs a handshake and one message each way.
fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: &str,
) -> Result<(ClientConnection, ServerConnection), Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(client, name)?;
    let mut server = ServerConnection::new(server)?;
    // A full handshake is three flights; more rounds mean somebody waits for nothing.
    for _ in 0..6 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server.read_tls(&mut wire.as_slice()).unwrap();
        let refused = server.process_new_packets();
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        refused?;
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(
        !client.is_handshaking() && !server.is_handshaking(),
        "stuck"
    );
    Ok((client, server))
}

fn identity(seed: u8) -> Identity {
    Identity::from_seed(&[seed; 32])
}

fn guest() -> Arc<ServerConfig> {
    let edge = identity(2).public();
    server_config(identity(1).leaf(NAME, HOUR).unwrap(), Some(edge), HTTP1).unwrap()
}

fn edge_client(pins: &Identity, shows: Option<&Identity>) -> Arc<ClientConfig> {
    let leaf = shows.map(|identity| identity.leaf("edge.casemate", HOUR).unwrap());
    client_config(&pins.public(), leaf, HTTP1).unwrap()
}

#[test]
fn both_sides_pinned_get_through_with_the_best_there_is() {
    let (client, server) =
        handshake(edge_client(&identity(1), Some(&identity(2))), guest(), NAME).unwrap();
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(client.alpn_protocol(), Some(b"http/1.1".as_slice()));
    let group = format!(
        "{:?}",
        client.negotiated_key_exchange_group().unwrap().name()
    );
    assert_eq!(group, "X25519MLKEM768");
    assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    assert_eq!(server.peer_certificates().unwrap().len(), 1);
}

#[test]
fn a_server_of_another_identity_is_refused() {
    let client = edge_client(&identity(3), Some(&identity(2)));
    assert!(matches!(
        handshake(client, guest(), NAME),
        Err(Error::InvalidCertificate(_))
    ));
}

#[test]
fn a_server_of_another_name_is_refused() {
    for other in ["ws-ffffffffffffffff.guest.casemate", "casemate", "10.0.0.1"] {
        let client = edge_client(&identity(1), Some(&identity(2)));
        assert!(matches!(
            handshake(client, guest(), other),
            Err(Error::InvalidCertificate(_))
        ));
    }
}

#[test]
fn a_client_without_or_with_another_certificate_is_refused() {
    let nobody = edge_client(&identity(1), None);
    assert!(matches!(
        handshake(nobody, guest(), NAME),
        Err(Error::NoCertificatesPresented)
    ));
    for other in [1, 3] {
        let client = edge_client(&identity(1), Some(&identity(other)));
        assert!(matches!(
            handshake(client, guest(), NAME),
            Err(Error::InvalidCertificate(_))
        ));
    }
}

#[test]
fn without_a_client_anchor_any_client_gets_through() {
    let open = server_config(identity(1).leaf(NAME, HOUR).unwrap(), None, HTTP2_AND_1).unwrap();
    handshake(edge_client(&identity(1), None), open, NAME).unwrap();
}

#[test]
fn no_session_is_resumed() {
    let client = edge_client(&identity(1), Some(&identity(2)));
    let server = guest();
    for _ in 0..3 {
        let (client, _) = handshake(client.clone(), server.clone(), NAME).unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn tls_1_2_is_refused_on_both_sides() {
    let old = Arc::new(seal::tls::rustls::crypto::aws_lc_rs::default_provider());
    let ca = local_ca::make().unwrap();
    let cert = local_ca::issue(&ca.key_pem, &["localhost".into()], &[], HOUR).unwrap();

    let old_client = ClientConfig::builder_with_provider(old.clone())
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let refused = handshake(Arc::new(old_client), guest(), NAME);
    assert!(
        matches!(refused, Err(Error::PeerIncompatible(_))),
        "{refused:?}"
    );

    let chain =
        seal::tls::rustls_pki_types::pem::PemObject::from_pem_slice(cert.cert_pem.as_bytes());
    let key = seal::tls::rustls_pki_types::pem::PemObject::from_pem_slice(cert.key_pem.as_bytes());
    let old_server = ServerConfig::builder_with_provider(old)
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![chain.unwrap()], key.unwrap())
        .unwrap();
    let client = client_config_ca(&ca.cert_pem, HTTP1).unwrap();
    let refused = handshake(client, Arc::new(old_server), "localhost");
    assert!(
        matches!(refused, Err(Error::PeerIncompatible(_))),
        "{refused:?}"
    );
    // And our provider could not speak it if it wanted to.
    assert!(
        provider()
            .cipher_suites
            .iter()
            .all(|suite| suite.tls13().is_some())
    );
}

#[test]
fn the_local_ca_serves_names_and_addresses() {
    let ca = local_ca::make().unwrap();
    let ips: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    let names = ["localhost".to_owned(), "*.preview.example.test".to_owned()];
    let cert = local_ca::issue(&ca.key_pem, &names, &ips, HOUR).unwrap();
    let server = server_config_pem(&cert.cert_pem, &cert.key_pem, HTTP2_AND_1).unwrap();
    for name in [
        "localhost",
        "127.0.0.1",
        "::1",
        "3000-abc.preview.example.test",
    ] {
        let client = client_config_ca(&ca.cert_pem, HTTP2_AND_1).unwrap();
        let (client, _) = handshake(client, server.clone(), name).unwrap();
        assert_eq!(client.alpn_protocol(), Some(b"h2".as_slice()));
    }
    for name in ["example.test", "127.0.0.2", "a.b.preview.example.test"] {
        let client = client_config_ca(&ca.cert_pem, HTTP1).unwrap();
        assert!(handshake(client, server.clone(), name).is_err(), "{name}");
    }
    // Neither another CA of the same name nor an identity's pin takes it.
    let other = client_config_ca(&local_ca::make().unwrap().cert_pem, HTTP2_AND_1).unwrap();
    assert!(handshake(other, server.clone(), "localhost").is_err());
    let pinned = client_config(&identity(1).public(), None, HTTP2_AND_1).unwrap();
    assert!(handshake(pinned, server, "localhost").is_err());
    assert!(!format!("{cert:?}").contains("PRIVATE"));
}

#[test]
fn nonsense_is_refused_with_its_reason() {
    let ca = local_ca::make().unwrap();
    let cert = local_ca::issue(&ca.key_pem, &["a.test".into()], &[], HOUR).unwrap();
    let other = local_ca::issue(&ca.key_pem, &["a.test".into()], &[], HOUR).unwrap();
    assert!(server_config_pem(&cert.cert_pem, &other.key_pem, HTTP1).is_err());
    assert!(server_config_pem("", &cert.key_pem, HTTP1).is_err());
    assert!(server_config_pem(&cert.cert_pem, "", HTTP1).is_err());
    assert!(client_config_ca("-----BEGIN CERTIFICATE-----\nAAAA", HTTP1).is_err());
    assert!(client_config_ca("", HTTP1).is_err());
    assert!(local_ca::issue(&ca.key_pem, &[], &[], HOUR).is_err());
    assert!(local_ca::issue(&ca.key_pem, &vec!["a.test".into(); 101], &[], HOUR).is_err());
    assert!(local_ca::issue("no key", &["a.test".into()], &[], HOUR).is_err());
    assert!(
        identity(1)
            .leaf(NAME, Duration::from_secs(399 * 86_400))
            .is_err()
    );
    assert!(identity(1).leaf(NAME, Duration::MAX).is_err());
    assert!(identity(1).leaf("bücher.test", HOUR).is_err());
}
