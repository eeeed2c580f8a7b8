//! `casemate verify`: every claim with a check holds, under both ways of unsealing.

use crate::world::Platform;

const PASSPHRASE: &str = "correct horse battery staple";
/// A disk limit that a slow guest reaches as well: else DSK-5 is not put to the test.
const LIMITS: &str = "[limits]\ndisk_bytes_per_s = 33554432\n";

#[test]
fn every_claim_holds_under_a_passphrase() {
    let p = Platform::start(
        &format!("[kms]\nunseal = \"passphrase\"\n{LIMITS}"),
        Some(PASSPHRASE),
    );
    let unsealed = p.casemate_with(&["kms", "unseal"], PASSPHRASE);
    p.expect_ok("kms unseal", &unsealed);
    let rows = verify(&p);
    for (id, status, evidence) in &rows {
        assert_eq!(status, "pass", "{id}: {evidence}");
    }
    assert!(rows.len() >= 30, "only {} checks ran", rows.len());
}

#[test]
fn a_file_unseal_is_said_openly() {
    let p = Platform::start(&format!("[host]\npool_size = 1\n{LIMITS}"), None);
    for (id, status, evidence) in verify(&p) {
        // What a key beside its ciphertext opens.
        let wanted = match id.as_str() {
            "KMS-2" | "DSK-3" | "DSK-8" => "not_yet",
            _ => "pass",
        };
        assert_eq!(status, wanted, "{id}: {evidence}");
    }
}

/// (id, status, evidence) of every check.
fn verify(p: &Platform) -> Vec<(String, String, String)> {
    let out = p.casemate(&["--json", "verify"]);
    let text = String::from_utf8_lossy(&out.stdout);
    let Ok(rows) = serde_json::from_str::<Vec<serde_json::Value>>(&text) else {
        p.expect_ok("verify", &out);
        panic!("verify printed no JSON: {text}");
    };
    let field = |row: &serde_json::Value, name: &str| row[name].as_str().unwrap().to_owned();
    rows.iter()
        .map(|r| (field(r, "id"), field(r, "status"), field(r, "evidence")))
        .collect()
}
