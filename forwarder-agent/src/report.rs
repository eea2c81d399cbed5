//! What the input amounts to, for the admin endpoint and the log; kept such that a small change is published at a small
//! cost.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use imbl::ordmap::DiffItem;

use crate::view;
use forwarder_gateway::model::ListenerKey;
use forwarder_gateway::problem::{Problem, Reason, Severity};
use forwarder_gateway::resolve;
use forwarder_gateway::status::Statuses;
use forwarder_source::{Loaded, Locations};

/// What the input amounts to.
#[derive(Debug, Default)]
pub struct Report {
    /// What is wrong with the input.
    pub input: InputProblems,
    /// What this node cannot do of it: bind a listener, or serve it at the tier that it asks for.
    pub node_problems: Vec<Problem>,
    /// The statuses, bind failures included.
    pub statuses: Arc<Statuses>,
    /// How often the input was put into force.
    pub updates: Updates,
    /// What the kernel does for the agent.
    pub datapath: view::DatapathView,
    /// The listeners that are to be direct, and whether they are.
    pub direct: BTreeMap<ListenerKey, bool>,
    /// Those that are not, and why.
    pub refused_direct: BTreeMap<ListenerKey, String>,
    /// The agent is ending.
    pub draining: bool,
}

/// How often the input was put into force.
#[derive(Clone, Copy, Debug, Default)]
pub struct Updates {
    /// All of it.
    pub full: u64,
    /// Nothing but endpoints, for nothing else had changed.
    pub endpoints: u64,
}

impl Report {
    /// All problems: those of the input first, with their places.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.input.list();
        problems.extend(self.node_problems.iter().cloned());
        problems
    }

    /// Replaces the problems of the input, and logs those that are new, and those that are over.
    pub fn set_input(&mut self, input: InputProblems) {
        log_changes(&self.input.not_in(&input), &input.not_in(&self.input));
        self.input = input;
    }

    /// Replaces the problems of this node, and logs those that are new, and those that are over.
    pub fn set_node_problems(&mut self, problems: Vec<Problem>) {
        log_changes(&self.node_problems, &problems);
        self.node_problems = problems;
    }
}

/// Logs what differs between the problems of `before` and of `after`; one that only stands at another line does not.
fn log_changes<'a>(
    before: impl IntoIterator<Item = &'a Problem> + Copy,
    after: impl IntoIterator<Item = &'a Problem> + Copy,
) {
    let placeless = |problem: &Problem| Problem { location: None, ..problem.clone() };
    let (were, are): (HashSet<Problem>, HashSet<Problem>) =
        (before.into_iter().map(placeless).collect(), after.into_iter().map(placeless).collect());
    for problem in before.into_iter().filter(|problem| !are.contains(&placeless(problem))) {
        tracing::info!(reason = problem.reason.as_str(), "solved: {problem}");
    }
    for problem in after.into_iter().filter(|problem| !were.contains(&placeless(problem))) {
        log(problem);
    }
}

fn log(problem: &Problem) {
    match problem.severity {
        Severity::Error => tracing::error!(reason = problem.reason.as_str(), "{problem}"),
        Severity::Warning => tracing::warn!(reason = problem.reason.as_str(), "{problem}"),
    }
}

/// What is wrong with the input. Cloning takes no time.
#[derive(Clone, Debug, Default)]
pub struct InputProblems {
    of_source: Arc<[Problem]>,
    of_resolver: resolve::Problems,
    locations: Locations,
}

impl InputProblems {
    /// What is wrong with what a source has loaded, and with what that resolves to.
    pub fn new(loaded: &Loaded, of_resolver: resolve::Problems) -> Self {
        Self { of_source: Arc::clone(&loaded.problems), of_resolver, locations: loaded.locations.clone() }
    }

    /// All problems with their places, in the order of these; at the same place those of the source come first. What only follows from
    /// others comes last.
    pub fn list(&self) -> Vec<Problem> {
        let of_resolver = self.of_resolver.list().into_iter().map(|problem| self.locate(problem));
        let mut problems: Vec<Problem> = self.of_source.iter().cloned().chain(of_resolver).collect();
        let key = |it: &Problem| (matches!(it.reason, Reason::Refused | Reason::NoRoute), it.severity);
        problems.sort_by(|a, b| {
            let (a_key, b_key) = (key(a), key(b));
            (a_key.0, &a.location, a_key.1, &a.field).cmp(&(b_key.0, &b.location, b_key.1, &b.field))
        });
        problems
    }

    fn locate(&self, mut problem: Problem) -> Problem {
        self.locations.locate(&mut problem);
        problem
    }

    /// The problems that are not among those of `old`, with their places.
    fn not_in(&self, old: &Self) -> BTreeSet<Problem> {
        let mut new: BTreeSet<Problem> = additions(&old.of_source, &self.of_source).cloned().collect();
        let general = additions(&old.of_resolver.general, &self.of_resolver.general);
        new.extend(general.map(|problem| self.locate(problem.clone())));
        for difference in old.of_resolver.of_backends.diff(&self.of_resolver.of_backends) {
            let (before, after) = match difference {
                DiffItem::Add(_, after) => (&Arc::default(), after),
                DiffItem::Update { old: (_, before), new: (_, after) } => (before, after),
                DiffItem::Remove(_, _) => continue,
            };
            new.extend(additions(before, after).map(|problem| self.locate(problem.clone())));
        }
        new
    }
}

/// What is in `new` and not in `old`.
fn additions<'a>(old: &'a Arc<[Problem]>, new: &'a Arc<[Problem]>) -> impl Iterator<Item = &'a Problem> {
    let is_same = Arc::ptr_eq(old, new);
    let known: HashSet<&Problem> = if is_same { HashSet::new() } else { old.iter().collect() };
    let new: &[Problem] = if is_same { &[] } else { new };
    new.iter().filter(move |problem| !known.contains(problem))
}
