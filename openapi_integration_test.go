//go:build integration

package main

import (
	"fmt"
	"strings"
	"testing"
)

// What the daemon passes on is as docs/openapi.json says, whatever the service does.
func TestEnginesAnswersFitTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, _ := readAPI(t)
	m := newMachine(t, nil)
	id := newID()
	ask := func(route, body string) answer {
		t.Helper()
		op := operations[route]
		return m.do(t, op.method, strings.ReplaceAll(op.path, "{id}", id), body).want(t, op.success)
	}
	fits := func(when string) {
		t.Helper()
		for _, route := range []string{"GET /service", "GET /service/{id}", "GET /service/{id}/stats"} {
			a := ask(route, "")
			media := operations[route].Responses[200].Content[a.header.Get("Content-Type")]
			var value any
			if decode(t, a.body, &value); media.Examples == nil || !media.Schema.fits(value) {
				t.Errorf("%s, %s: not as documented: %s", route, when, a.body)
			}
		}
	}
	usual := operations["POST /service"].bodies()[1]
	ask("POST /service", strings.NewReplacer(`"demo"`, `"`+id+`"`, "example/hello:1", m.image, `"/hello"`, `"/probe","run","/data"`, "8080", "0").Replace(usual))
	fits("created")
	m.ctl(t, id, "start")
	m.report(t, id)
	fits("running")
	for _, route := range []string{"POST /service/{id}/stdin", "POST /service/{id}/tty", "PATCH /service/{id}/env"} {
		ask(route, operations[route].bodies()[0])
	}
	if got := ask("GET /service/{id}/logs", "").header.Get("Content-Type"); operations["GET /service/{id}/logs"].Responses[200].Content[got].Examples == nil {
		t.Errorf("logs are %q", got)
	}
	m.do(t, "GET", "/service/"+id+"/logs?stdout=false&stderr=false", "").want(t, 400) // by the engine itself
	m.ctl(t, id, "kill")
	fits("killed")

	id = newID()
	m.foreign(t, id, nil)
	a := m.createAs(t, id, "").want(t, 409)
	var got any
	decode(t, a.body, &got)
	want := operations["POST /service"].Responses[409].Content["application/json"].Examples["IDTaken"].Value
	if is := strings.ReplaceAll(fmt.Sprint(got), id, "demo"); anyID.ReplaceAllString(is, "ID") != anyID.ReplaceAllString(fmt.Sprint(want), "ID") {
		t.Errorf("got  %s\nwant %s", is, want)
	}
}
