//! `forwarder completions`.

use clap::Args;

#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &CompletionsArgs) {
    clap_complete::generate(args.shell, &mut super::command(), "forwarder", &mut std::io::stdout());
}
