//! The five logs, one per retention class, so that expiry is always a prefix of a log.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most bytes of an installation's name in an origin.
const INSTALLATION_BYTES_MAX: usize = 63;

/// The retention class of an entry, which is also the name of the log it goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Calls of the control plane's API: 90 days.
    Api,
    /// Host audit: operator sessions, elevations, key requests: 365 days.
    Host,
    /// Network flow metadata: 30 days.
    Flow,
    /// Metering: 90 days.
    Metering,
    /// Security events, prunings of the other logs included: 730 days.
    Security,
}

/// Why a class or an installation's name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClassError {
    /// Not one of the five names.
    #[error("parse log class: unknown name; use api, host, flow, metering or security")]
    UnknownName,
    /// Not one of the five codes.
    #[error("parse log class: unknown code {0}; this release knows 1 to 5")]
    UnknownCode(u8),
    /// The installation's name can't stand in an origin line.
    #[error(
        "build log origin: installation name must be 1 to 63 of a-z, 0-9 and '-'; \
         set another name in the configuration"
    )]
    Installation,
}

impl Class {
    /// All classes, in the order of their codes.
    pub const ALL: [Class; 5] = [
        Class::Api,
        Class::Host,
        Class::Flow,
        Class::Metering,
        Class::Security,
    ];

    /// The name: of the log's directory, in origins and in receipts.
    pub const fn name(self) -> &'static str {
        match self {
            Class::Api => "api",
            Class::Host => "host",
            Class::Flow => "flow",
            Class::Metering => "metering",
            Class::Security => "security",
        }
    }

    /// The byte that stands for the class in a leaf.
    pub const fn code(self) -> u8 {
        match self {
            Class::Api => 1,
            Class::Host => 2,
            Class::Flow => 3,
            Class::Metering => 4,
            Class::Security => 5,
        }
    }

    /// The class of a leaf's class byte.
    ///
    /// # Errors
    /// [`ClassError::UnknownCode`] for any byte but 1 to 5.
    pub fn from_code(code: u8) -> Result<Class, ClassError> {
        Class::ALL
            .into_iter()
            .find(|c| c.code() == code)
            .ok_or(ClassError::UnknownCode(code))
    }

    /// How long entries are kept, in days.
    pub const fn retention_days(self) -> u32 {
        match self {
            Class::Api => 90,
            Class::Host => 365,
            Class::Flow => 30,
            Class::Metering => 90,
            Class::Security => 730,
        }
    }

    /// The checkpoint origin `casemate.local/<installation>/<class>` of this class's log.
    ///
    /// # Errors
    /// [`ClassError::Installation`] unless `installation` is 1 to 63 of `a-z`, `0-9`, `-`.
    pub fn origin(self, installation: &str) -> Result<String, ClassError> {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if installation.is_empty()
            || installation.len() > INSTALLATION_BYTES_MAX
            || !installation.bytes().all(ok)
        {
            return Err(ClassError::Installation);
        }
        Ok(format!("casemate.local/{installation}/{}", self.name()))
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Class {
    type Err = ClassError;

    fn from_str(s: &str) -> Result<Class, ClassError> {
        Class::ALL
            .into_iter()
            .find(|c| c.name() == s)
            .ok_or(ClassError::UnknownName)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_and_codes_round_trip() {
        for class in Class::ALL {
            assert_eq!(class.name().parse::<Class>().unwrap(), class);
            assert_eq!(Class::from_code(class.code()).unwrap(), class);
        }
        assert!("Api".parse::<Class>().is_err());
        assert!(Class::from_code(0).is_err() && Class::from_code(6).is_err());
    }

    #[test]
    fn retention_is_what_the_claim_says() {
        let days: Vec<u32> = Class::ALL.iter().map(|c| c.retention_days()).collect();
        assert_eq!(days, [90, 365, 30, 90, 730]);
    }

    #[test]
    fn origin_takes_only_a_plain_name() {
        assert_eq!(
            Class::Host.origin("lab-1").unwrap(),
            "casemate.local/lab-1/host"
        );
        for bad in ["", "a b", "a/b", "A", "a\n", "ü", &"a".repeat(64)] {
            assert_eq!(
                Class::Host.origin(bad),
                Err(ClassError::Installation),
                "{bad:?}"
            );
        }
    }
}
