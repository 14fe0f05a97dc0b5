//go:build integration

package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// consoleRun starts a service with the probe in a mode, and follows what it prints.
func (m *machine) consoleRun(t *testing.T, mode, extra string) (id string, l logStream) {
	t.Helper()
	id = m.create(t, fmt.Sprintf(`"cmd":["/probe",%q,"/data","40000"],%s`, mode, extra))
	m.ctl(t, id, "start")
	return id, logsOpen(t, m.daemon, "/service/"+id+"/logs?follow=true")
}

func TestShellOnATTYIsDrivenThroughTheConsole(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "shell", `"tty":true`)
	l.wait(t, "ready")
	r := stdinOpen(t, m.daemon, id)
	for i := range 20 {
		fmt.Fprintf(r, "say word %d\r", i)
		l.wait(t, fmt.Sprintf("<word %d>\r\n", i))
	}
	for _, size := range []string{"24x80", "1x1", "65535x65535", "50x132"} {
		rows, cols, _ := strings.Cut(size, "x")
		m.do(t, "POST", "/service/"+id+"/tty", fmt.Sprintf(`{"rows":%s,"cols":%s}`, rows, cols)).want(t, 204)
		l.wait(t, "size "+size+"\r\n")
	}
	io.WriteString(r, "sayx\x7f one\x15say two\n") // the tty edits the line
	l.wait(t, "<two>\r\n")
	io.WriteString(r, "exit\n")
	if err := l.end(t); err != nil {
		t.Errorf("the logs ended with %v", err)
	}
	io.WriteString(r, "say nothing\n")
	if a := r.answer(t); a.status != 409 {
		t.Errorf("after its end: %d %s", a.status, a.body)
	}
	m.do(t, "POST", "/service/"+id+"/tty", `{"rows":24,"cols":80}`).want(t, 409)
	if a := m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200); a.body != l.text.String() {
		t.Errorf("logs %q, followed %q", a.body, l.text)
	}
}

func TestOutputsOfAServiceWithoutTTY(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	id, l := m.consoleRun(t, "both", `"tty":false`)
	var out, errs []string
	for i := range 500 {
		out, errs = append(out, fmt.Sprintf("out %d", i)), append(errs, fmt.Sprintf("err %d", i))
	}
	// The engine keeps what ends no line until more comes or the service ends, and does not
	// always send that to who follows.
	l.wait(t, "out 499\n")
	l.wait(t, "err 499\n")
	wantLines := func(query string, prefix string, want []string) {
		t.Helper()
		a := m.do(t, "GET", "/service/"+id+"/logs"+query, "").want(t, 200)
		var got []string
		for line := range strings.Lines(a.body) {
			if strings.HasPrefix(line, prefix) {
				got = append(got, strings.TrimSuffix(line, "\n"))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("logs%s: %d lines with %q, want %d; last %q", query, len(got), prefix, len(want),
				got[max(0, len(got)-1):])
		}
	}
	wantLines("", "out", out)
	wantLines("", "err", errs)
	wantLines("?stderr=false", "", out)
	wantLines("?stdout=false", "", errs)
	wantLines("?tail=0", "", nil)
	if a := m.do(t, "GET", "/service/"+id+"/logs?tail=3", "").want(t, 200); strings.Count(a.body, "\n") != 3 {
		t.Errorf("logs?tail=3: %q", a.body)
	}
	wantLines("?since=0&until=9999999999.999999999", "out", out)

	stamped := m.do(t, "GET", "/service/"+id+"/logs?timestamps=true&stderr=false", "").want(t, 200)
	lines := strings.Split(strings.TrimSpace(stamped.body), "\n")
	stamp, text, _ := strings.Cut(lines[250], " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil || text != "out 250" {
		t.Fatalf("line %q: %v", lines[250], err)
	}
	since := fmt.Sprintf("%d.%09d", at.Unix(), at.Nanosecond())
	after := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&since="+since, "").want(t, 200).body
	if !strings.HasPrefix(after, "out 250\n") || !strings.HasSuffix(after, "out 499\n") {
		t.Errorf("logs since %s: %.40q", since, after)
	}
	before := m.do(t, "GET", "/service/"+id+"/logs?stderr=false&until="+since, "").want(t, 200).body
	if !strings.HasPrefix(before, "out 0\n") || !strings.HasSuffix(before, "out 250\n") {
		t.Errorf("logs until %s: ends with %q", since, consoleTail(before))
	}

	m.ctl(t, id, "kill")
	if err := l.end(t); err != nil {
		t.Error(err)
	}
	follow := m.do(t, "GET", "/service/"+id+"/logs?follow=true", "").want(t, 200)
	if !strings.Contains(follow.body, "the end of out") || !strings.Contains(follow.body, "the end of err") {
		t.Errorf("the last words are not in the logs: %q", consoleTail(follow.body))
	}
	if follow.body != m.do(t, "GET", "/service/"+id+"/logs", "").want(t, 200).body {
		t.Error("the logs of a stopped service differ if they are followed")
	}
}

func TestEveryByteReachesAProgram(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "record", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			read := func(size int) string { // what it reads, when it is as much
				var text []byte
				waitFor(t, "what the service reads", func() bool {
					text, _ = os.ReadFile(filepath.Join(m.binds, id, "stdin"))
					return len(text) >= size
				})
				return string(text)
			}
			want := ""
			for _, chunk := range consoleBytes() {
				m.do(t, "POST", "/service/"+id+"/stdin", chunk).want(t, 204)
				want += chunk
			}
			if got := read(len(want)); got != want {
				t.Fatalf("the service has read %d bytes, ending with %q, of %d, ending with %q", len(got),
					consoleTail(got), len(want), consoleTail(want))
			}
			var writers sync.WaitGroup
			for writer := range 10 {
				writers.Go(func() {
					for number := range 5 {
						record := consoleRecord(writer, number, 1500)
						m.do(t, "POST", "/service/"+id+"/stdin", record).want(t, 204)
					}
				})
			}
			writers.Wait()
			if records := consoleRecords(t, read(len(want) + 10*5*1512)[len(want):]); records != 10*5 {
				t.Errorf("%d records", records)
			}
		})
	}
}

// The console of the documents, on Node.js: at which nobody types for longer than the daemon waits for a
// header.
func TestConsoleOfTheDocumentsOnNode(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("there is no Node.js here")
	}
	m := newMachine(t, nil)
	id, _ := m.consoleRun(t, "shell", "")
	console := exec.CommandContext(t.Context(), "node", "docs/console.mjs", m.url, id)
	console.Env = append(os.Environ(), "COREKEY="+m.key)
	var out, complaints syncBuffer
	console.Stdout, console.Stderr = &out, &complaints
	keys, err := console.StdinPipe()
	must(t, cmp.Or(err, console.Start()))
	ended := make(chan error, 1)
	go func() { ended <- console.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it ended while nobody typed: %v\n%s%s", err, &out, &complaints)
	case <-time.After(15 * time.Second):
	}
	io.WriteString(keys, "say hello\n")
	waitFor(t, "the answer", func() bool { return strings.Contains(out.String(), "<hello>") })
	io.WriteString(keys, "exit\n")
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v\n%s%s", err, &out, &complaints)
	}
	refused, err := exec.Command("node", "docs/console.mjs", m.url, "nobody").CombinedOutput()
	if err == nil || !strings.Contains(string(refused), "core authorization") {
		t.Errorf("without the key: %v, %s", err, refused)
	}
}

func TestServiceThatDoesNotReadItsStdin(t *testing.T) {
	t.Parallel()
	m := newMachine(t, func(c *config) { c.timeouts.clientWrite = 2 * haste() })
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprintf("tty %v", tty), func(t *testing.T) {
			t.Parallel()
			id, l := m.consoleRun(t, "deaf", fmt.Sprintf(`"tty":%v`, tty))
			l.wait(t, "ready")
			other, l2 := m.consoleRun(t, "record", `"tty":false`)
			l2.wait(t, "ready")
			sent := crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", strings.Repeat("x", 1<<20))
			for range 5 {
				m.do(t, "POST", "/service/"+other+"/stdin", "x").want(t, 204)
			}
			(<-sent).want(t, 504)
			waitFor(t, "what the other service reads", func() bool {
				text, _ := os.ReadFile(filepath.Join(m.binds, other, "stdin"))
				return string(text) == "xxxxx"
			})
			sent = crowdSend(t, m.daemon, "POST", "/service/"+id+"/stdin", "x") // the engine has room for no more
			m.ctl(t, id, "kill")
			(<-sent).want(t, 409)
		})
	}
}
