//! `casemate-edge`: see the library.

fn main() -> anyhow::Result<()> {
    let boot = service::boot("edge")?;
    match boot.command {
        service::Command::Init => edge::init(&boot),
        service::Command::Run => edge::run(&boot),
    }
}
