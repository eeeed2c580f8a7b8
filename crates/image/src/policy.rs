//! What an operator takes: from where, signed by whom, with which privileges and of which size.
//!
//! ```toml
//! default = "digest-pin"            # or "refuse": sources that no rule names
//! allow_setuid = ["/usr/bin/su"]    # in place of the list built in
//! allow_capabilities = []
//!
//! [limits]
//! image_unpacked_max_bytes = 4294967296
//!
//! [[rule]]                          # the longest prefix wins
//! prefix = "registry.example/team"
//! require = "signature"             # or "digest-pin", "refuse"
//! keys = ["""
//! -----BEGIN PUBLIC KEY-----
//! …
//! -----END PUBLIC KEY-----
//! """]
//! identity = "registry.example/team/app"   # the docker-reference signed; default: where it is pulled
//! ```
//!
//! Must never take an unknown field for granted: a policy with a typing error is refused.

use crate::error::{Error, os};
use crate::limits::{Limits, POLICY_MAX_BYTES};
use seal::verify::PublicKey;
use serde::Deserialize;
use std::path::Path;

/// Programs that Debian, Alpine and Fedora install with a setuid or setgid bit. Inside a workspace
/// the caller is root already; the list is to tell them from what somebody added.
pub const SETUID: &[&str] = &[
    "/bin/bbsuid",
    "/bin/mount",
    "/bin/ping",
    "/bin/su",
    "/bin/umount",
    "/sbin/unix_chkpwd",
    "/usr/bin/at",
    "/usr/bin/bsd-write",
    "/usr/bin/chage",
    "/usr/bin/chfn",
    "/usr/bin/chsh",
    "/usr/bin/crontab",
    "/usr/bin/dotlockfile",
    "/usr/bin/expiry",
    "/usr/bin/fusermount",
    "/usr/bin/fusermount3",
    "/usr/bin/gpasswd",
    "/usr/bin/mount",
    "/usr/bin/newgidmap",
    "/usr/bin/newgrp",
    "/usr/bin/newuidmap",
    "/usr/bin/passwd",
    "/usr/bin/ping",
    "/usr/bin/pkexec",
    "/usr/bin/ssh-agent",
    "/usr/bin/su",
    "/usr/bin/sudo",
    "/usr/bin/umount",
    "/usr/bin/wall",
    "/usr/bin/write",
    "/usr/bin/write.ul",
    "/usr/lib/dbus-1.0/dbus-daemon-launch-helper",
    "/usr/lib/openssh/ssh-keysign",
    "/usr/lib/policykit-1/polkit-agent-helper-1",
    "/usr/sbin/mount.nfs",
    "/usr/sbin/unix_chkpwd",
];

/// Programs that they install with file capabilities.
pub const CAPABILITIES: &[&str] = &[
    "/bin/ping",
    "/usr/bin/arping",
    "/usr/bin/newgidmap",
    "/usr/bin/newuidmap",
    "/usr/bin/ping",
    "/usr/sbin/arping",
    "/usr/sbin/clockdiff",
];

/// Whether `path` (with or without its first `/`) is in the list.
#[must_use]
pub fn lists(list: &[String], path: &[u8]) -> bool {
    let bare = |p: &[u8]| p.strip_prefix(b"/").unwrap_or(p).to_vec();
    list.iter().any(|l| bare(l.as_bytes()) == bare(path))
}

/// What is required of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Require {
    /// Its digest is named by who imports it.
    DigestPin,
    /// That, and a signature by one of the keys.
    Signature,
    /// It is not taken.
    Refuse,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    prefix: String,
    require: Require,
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    identity: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    default: Require,
    allow_setuid: Option<Vec<String>>,
    allow_capabilities: Option<Vec<String>>,
    limits: Limits,
    rule: Vec<RuleFile>,
}

impl Default for File {
    fn default() -> Self {
        Self {
            default: Require::DigestPin,
            allow_setuid: None,
            allow_capabilities: None,
            limits: Limits::default(),
            rule: Vec::new(),
        }
    }
}

/// A rule of the policy.
#[derive(Debug, Clone)]
pub struct Rule {
    prefix: String,
    /// What it requires.
    pub require: Require,
    /// Whose signature it takes.
    pub keys: Vec<PublicKey>,
    /// The name that must be signed; none: where it is pulled from.
    pub identity: Option<String>,
}

/// What an operator takes.
#[derive(Debug, Clone)]
pub struct Policy {
    default: Rule,
    rules: Vec<Rule>,
    /// Paths that may have setuid or setgid bits.
    pub allow_setuid: Vec<String>,
    /// Paths that may have file capabilities.
    pub allow_capabilities: Vec<String>,
    /// Bounds.
    pub limits: Limits,
}

impl Rule {
    /// Whether it is written for exactly this name.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        self.prefix == name
    }
}

impl Default for Policy {
    fn default() -> Self {
        let own = |list: &[&str]| list.iter().map(|p| (*p).to_owned()).collect();
        Self {
            default: rule_default(Require::DigestPin),
            rules: Vec::new(),
            allow_setuid: own(SETUID),
            allow_capabilities: own(CAPABILITIES),
            limits: Limits::default(),
        }
    }
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// The file's, and what in it is wrong.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let bytes = service::files::read_bounded(path, POLICY_MAX_BYTES)
            .map_err(os(format!("read the policy {shown}")))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::Policy(format!("{shown} is no UTF-8 text")))?;
        Self::parse(&text).map_err(|e| match e {
            Error::Policy(why) => Error::Policy(format!("{shown}: {why}")),
            other => other,
        })
    }

    /// Reads a policy.
    ///
    /// # Errors
    /// What in it is wrong.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let file: File = toml::from_str(text).map_err(|e| Error::Policy(e.to_string()))?;
        let mut policy = Self::default();
        if file.default == Require::Signature {
            let what = "default can't be \"signature\": it has no keys; write a [[rule]]";
            return Err(Error::Policy(what.into()));
        }
        policy.default = rule_default(file.default);
        policy.limits = file.limits;
        let paths = |list: Vec<String>, what: &str| {
            if let Some(bad) = list.iter().find(|p| !p.starts_with('/')) {
                let what = format!("{what}: {bad:?} must start with /");
                return Err(Error::Policy(what));
            }
            Ok(list)
        };
        if let Some(list) = file.allow_setuid {
            policy.allow_setuid = paths(list, "allow_setuid")?;
        }
        if let Some(list) = file.allow_capabilities {
            policy.allow_capabilities = paths(list, "allow_capabilities")?;
        }
        policy.rules = file.rule.into_iter().map(rule).collect::<Result<_, _>>()?;
        for (n, rule) in policy.rules.iter().enumerate() {
            if policy.rules[..n].iter().any(|r| r.prefix == rule.prefix) {
                let what = format!("two rules for prefix {:?}", rule.prefix);
                return Err(Error::Policy(what));
            }
        }
        Ok(policy)
    }

    /// The rule for `host/repository`: the longest prefix that ends where a part of the name ends.
    #[must_use]
    pub fn rule(&self, name: &str) -> &Rule {
        let fits = |r: &&Rule| {
            let rest = name.strip_prefix(r.prefix.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let longest = self.rules.iter().filter(fits);
        longest
            .max_by_key(|r| r.prefix.len())
            .unwrap_or(&self.default)
    }
}

fn rule_default(require: Require) -> Rule {
    Rule {
        prefix: String::new(),
        require,
        keys: Vec::new(),
        identity: None,
    }
}

fn rule(file: RuleFile) -> Result<Rule, Error> {
    let prefix = file.prefix.trim_end_matches('/').to_owned();
    let wrong = |why: &str| Error::Policy(format!("rule {prefix:?}: {why}"));
    if prefix.is_empty() {
        return Err(wrong("prefix must name a registry, or `local`"));
    }
    let keys = file.keys.iter().map(|k| PublicKey::from_pem(k));
    let keys = keys
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| wrong(&format!("keys: {e}")))?;
    let signed = file.require == Require::Signature;
    if signed == keys.is_empty() {
        return Err(wrong(
            "`keys` belong to require = \"signature\", at least one",
        ));
    }
    if file.identity.is_some() && !signed {
        return Err(wrong("`identity` belongs to require = \"signature\""));
    }
    if signed && prefix == LOCAL {
        return Err(wrong("layouts carry no signatures: use digest-pin"));
    }
    Ok(Rule {
        require: file.require,
        keys,
        identity: file.identity,
        prefix,
    })
}

/// The name that layouts and archives have in a policy.
pub const LOCAL: &str = "local";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_longest_prefix_wins_and_ends_where_a_name_ends() {
        let policy = Policy::parse(
            "default = \"refuse\"\n[[rule]]\nprefix = \"r.example/team\"\nrequire = \"digest-pin\"\n\
             [[rule]]\nprefix = \"r.example/team/bad/\"\nrequire = \"refuse\"",
        )
        .unwrap();
        for (name, require) in [
            ("r.example/team/app", Require::DigestPin),
            ("r.example/team", Require::DigestPin),
            ("r.example/team/bad/app", Require::Refuse),
            ("r.example/teamster", Require::Refuse),
            ("r.example.org/team", Require::Refuse),
        ] {
            assert_eq!(policy.rule(name).require, require, "{name}");
        }
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        for bad in [
            "defualt = \"refuse\"",
            "default = \"signature\"",
            "allow_setuid = [\"usr/bin/su\"]",
            "[limits]\nentries = 1",
            "[[rule]]\nprefix = \"\"\nrequire = \"refuse\"",
            "[[rule]]\nprefix = \"a\"\nrequire = \"signature\"",
            "[[rule]]\nprefix = \"a\"\nrequire = \"signature\"\nkeys = [\"x\"]",
            "[[rule]]\nprefix = \"a\"\nrequire = \"digest-pin\"\nidentity = \"b\"",
            "[[rule]]\nprefix = \"a\"\nrequire = \"refuse\"\n[[rule]]\nprefix = \"a/\"\nrequire = \"refuse\"",
        ] {
            assert!(matches!(Policy::parse(bad), Err(Error::Policy(_))), "{bad}");
        }
        assert_eq!(
            Policy::parse("").unwrap().default.require,
            Require::DigestPin
        );
    }
}
