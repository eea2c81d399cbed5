//! The table of what came of every cell.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::{Cell, Event, Held, Side};

/// What came of one cell: how long it took, or what is wrong.
pub type Outcome = Result<Duration, String>;

/// What stands in one row.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Row {
    step: &'static str,
    held: Held,
    successor: Option<&'static str>,
}

impl Row {
    fn of(cell: &Cell) -> Self {
        Self { step: cell.step, held: cell.held, successor: cell.successor }
    }
}

/// What came of all.
#[derive(Debug)]
pub struct Table {
    cells: Vec<(Cell, Outcome)>,
    /// What is wrong with no cell in particular.
    left: Vec<String>,
}

impl Table {
    /// None yet, but what is wrong with no cell in particular.
    pub fn with(left: Vec<String>) -> Self {
        Self { cells: Vec::new(), left }
    }

    /// Notes what came of a cell.
    pub fn note(&mut self, cell: Cell, outcome: Outcome) {
        self.cells.push((cell, outcome));
    }

    /// How many cells failed.
    pub fn failures(&self) -> usize {
        self.cells.iter().filter(|(_, outcome)| outcome.is_err()).count() + self.left.len()
    }

    /// How many cells were played.
    pub fn count(&self) -> usize {
        self.cells.len()
    }

    fn outcome(&self, row: Row, event: Event, side: Side) -> &'static str {
        let cells = self
            .cells
            .iter()
            .filter(|(cell, _)| row == Row::of(cell) && cell.event == event && cell.side == side);
        let outcomes: Vec<bool> = cells.map(|(_, outcome)| outcome.is_ok()).collect();
        match (outcomes.is_empty(), outcomes.iter().all(|&is_well| is_well)) {
            (true, _) => " ",
            (false, true) => "+",
            (false, false) => "X",
        }
    }
}

impl fmt::Display for Table {
    /// Rows are steps, columns are events; each cell shows the client's and the endpoint's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "| step | held |")?;
        for event in Event::ALL {
            write!(formatter, " {event:?} |")?;
        }
        write!(formatter, "\n|---|---|")?;
        writeln!(formatter, "{}", "---|".repeat(Event::ALL.len()))?;
        let mut rows: Vec<Row> = Vec::new();
        for (cell, _) in &self.cells {
            if !rows.contains(&Row::of(cell)) {
                rows.push(Row::of(cell));
            }
        }
        for row in rows {
            let successor = row.successor.map(|at| format!(", killed, `{at}`")).unwrap_or_default();
            write!(formatter, "| `{}`{successor} | {} |", row.step, row.held.name())?;
            for event in Event::ALL {
                let [client, endpoint] = Side::BOTH.map(|side| self.outcome(row, event, side));
                write!(formatter, " {client} {endpoint} |")?;
            }
            writeln!(formatter)?;
        }
        let mut reasons: BTreeMap<String, &str> = BTreeMap::new();
        for (cell, outcome) in &self.cells {
            if let Err(reason) = outcome {
                reasons.insert(cell.to_string(), reason);
            }
        }
        for (cell, reason) in reasons {
            writeln!(formatter, "{cell}: {reason}")?;
        }
        for left in &self.left {
            writeln!(formatter, "{left}")?;
        }
        let slowest = self.cells.iter().filter_map(|(cell, outcome)| Some((outcome.as_ref().ok()?, cell)));
        if let Some((time, cell)) = slowest.max_by_key(|(time, _)| **time) {
            writeln!(formatter, "the slowest took {time:?}: {cell}")?;
        }
        Ok(())
    }
}
