//! What an operator asks of mint and the KMS, over their sockets, as root.

use anyhow::{Context as _, bail};
use api::rpc::blocking::call;
use model::AccountId;
use service::paths::Paths;
use std::io::{IsTerminal as _, Read as _};
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(30);

/// Makes an account.
///
/// # Errors
/// Mint's.
pub fn account_create(paths: &Paths, name: &str) -> anyhow::Result<AccountId> {
    let op = api::mint::Op::AccountCreate { name: name.into() };
    let made: api::mint::AccountMade = call(&paths.socket("mint", "mint"), "cli", &op, WAIT)?;
    Ok(made.account)
}

/// Makes an API key; its secret is in no other place.
///
/// # Errors
/// Mint's.
pub fn key_create(
    paths: &Paths,
    account: &AccountId,
    name: &str,
) -> anyhow::Result<api::mint::KeyMade> {
    let op = api::mint::Op::KeyCreate {
        account: account.clone(),
        name: name.into(),
    };
    Ok(call(&paths.socket("mint", "mint"), "cli", &op, WAIT)?)
}

/// Asks the KMS as the user of this process; `answered`, or the error's code.
#[must_use]
pub fn kms_ask(paths: &Paths, op: &api::kms::Op) -> String {
    match call::<_, serde_json::Value>(&paths.socket("kms", "kms"), "cli", op, WAIT) {
        Ok(_) => "answered".into(),
        Err(e) => e.code.as_str().into(),
    }
}

/// The KMS's state.
///
/// # Errors
/// The KMS's.
pub fn kms_status(paths: &Paths) -> anyhow::Result<api::kms::Status> {
    Ok(call(
        &paths.socket("kms", "kms"),
        "cli",
        &api::kms::Op::Status,
        WAIT,
    )?)
}

/// Unseals the KMS with a passphrase.
///
/// # Errors
/// The KMS's: a wrong passphrase is `key_refused`.
pub fn kms_unseal(paths: &Paths, passphrase: &str) -> anyhow::Result<api::kms::Status> {
    let op = api::kms::Op::Unseal {
        passphrase: passphrase.into(),
    };
    Ok(call(&paths.socket("kms", "kms"), "cli", &op, WAIT)?)
}

/// A new epoch now.
///
/// # Errors
/// The KMS's.
pub fn kms_rotate(paths: &Paths) -> anyhow::Result<api::kms::Status> {
    Ok(call(
        &paths.socket("kms", "kms"),
        "cli",
        &api::kms::Op::Rotate,
        WAIT,
    )?)
}

/// Reads a passphrase from standard input, without echo on a terminal.
///
/// # Errors
/// When it is shorter than 12 or longer than 1,024 bytes.
pub fn read_passphrase(prompt: &str) -> anyhow::Result<String> {
    use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    let mut line = String::new();
    if stdin.is_terminal() {
        eprint!("{prompt}: ");
        let before = tcgetattr(&stdin).context("read the terminal's modes")?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Now, &quiet)?;
        let read = stdin.read_line(&mut line);
        tcsetattr(&stdin, OptionalActions::Now, &before)?;
        eprintln!();
        read?;
    } else {
        stdin.lock().take(1_026).read_to_string(&mut line)?;
    }
    let phrase = line.trim_end_matches(['\r', '\n']);
    if !(12..=1_024).contains(&phrase.len()) {
        bail!("a passphrase has 12 to 1,024 bytes");
    }
    Ok(phrase.to_owned())
}
