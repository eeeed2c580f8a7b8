//! The public SDK, unmodified, does a workspace's whole life against us.

use crate::world::Platform;
use std::path::Path;
use std::process::Command;

#[test]
fn the_public_sdk_works_unmodified() {
    let p = Platform::start("", None);
    let account = p.account("sdk");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/platform/sdk");
    assert!(
        dir.join("node_modules/oblien").exists(),
        "the SDK is not installed: npm ci in {}",
        dir.display()
    );
    let out = Command::new("node")
        .arg("life.mjs")
        .current_dir(&dir)
        .env("NODE_EXTRA_CA_CERTS", p.ca())
        .env("CASEMATE_CONTROL_URL", p.control_url())
        .env("CASEMATE_GATEWAY_URL", p.gateway_url())
        .env("CASEMATE_CLIENT_ID", &account.id)
        .env("CASEMATE_CLIENT_SECRET", &account.secret)
        .output()
        .unwrap();
    p.expect_ok("node life.mjs", &out);
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.ends_with("all of it works\n"), "{said}");
}
